"""Computes with sums of low-rank changes through their factors, so that no array of the size of a weight is
formed.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
