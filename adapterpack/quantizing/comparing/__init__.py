"""Compares the ways of quantizing a bundle with an adapter, on the user's rows."""
