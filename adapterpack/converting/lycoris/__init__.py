"""Reads and writes the LyCORIS forms of a module in a kohya file."""
