"""GGUF, the file format of llama.cpp: its header, its tensor types, its names."""
