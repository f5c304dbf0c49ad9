"""Reads GGUF, the file format of llama.cpp: its header, its tensor types, its tensor names."""

MAGIC = b"GGUF"
"""The first bytes of a file."""
