"""Runs graphs with the adapter of each row: adapters in bank slots, in files of slot values, or as prompts in
the KV cache.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
