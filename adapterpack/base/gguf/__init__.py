"""GGUF, the file format of llama.cpp: its header, its tensor types, its names."""

MAGIC = b"GGUF"
"""What a file begins with."""
