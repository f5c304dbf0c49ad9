"""Quantizes the weights of a bundle's graphs (activations stay float), and measures the error."""
