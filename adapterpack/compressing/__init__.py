"""Brings many packs of one base into a fleet."""
