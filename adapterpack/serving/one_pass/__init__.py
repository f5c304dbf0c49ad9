"""Rows that take one pass each: how a request gets their results, and results as tensors."""
