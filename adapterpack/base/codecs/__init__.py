"""Reads and writes the weights of quantized checkpoints, one format per file."""
