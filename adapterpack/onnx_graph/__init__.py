"""Reads ONNX files without loading weights: finds where initializers are stored, and which tensors of a
checkpoint they hold.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
