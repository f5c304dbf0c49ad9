"""Requests to encoders, whose rows take one pass each: runs them, and converts results to tensors."""
