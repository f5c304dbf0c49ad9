"""Merges into GGUF files, llama.cpp's model format; every tensor keeps its type."""
