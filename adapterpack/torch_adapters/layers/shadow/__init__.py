"""Decoder layers with a shadow state, and the second model that computes where it starts."""
