"""Compresses many packs of one base into a fleet, which shares bases between them."""
