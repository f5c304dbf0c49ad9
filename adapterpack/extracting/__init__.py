"""Extracts an adapter from a fine-tuned checkpoint and its base (the reverse of a merge), without torch."""
