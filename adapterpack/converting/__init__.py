"""Converts packs to and from the adapter formats of other tools."""
