"""The manifest of a pack: its fields and limits, its versions, and the method that it describes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
