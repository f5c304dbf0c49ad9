"""Servers inside of another process, without an address of their own."""
