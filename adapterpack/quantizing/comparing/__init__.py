"""Compares the ways of quantizing a bundle with an adapter, on rows of the user's."""
