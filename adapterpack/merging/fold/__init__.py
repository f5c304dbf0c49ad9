"""Computes merged weights: the change of the adapters, block by block."""
