"""Reads GGUF, llama.cpp's file format: its header, tensor types and tensor names."""

MAGIC = b"GGUF"
"""The first bytes of a GGUF file."""
