"""Slots, the contract between a graph and the runtime: the inputs that a graph has for adapters at each site,
and the values that adapters write there.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
