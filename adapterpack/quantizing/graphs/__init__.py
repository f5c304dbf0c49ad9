"""Quantizes the weights of a bundle's graphs (activations stay float), and measures the error."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
