"""Hubs: where models and packs come from and go to - folders, hub ids, ``hf://`` references - and a small hub
of one's own.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
