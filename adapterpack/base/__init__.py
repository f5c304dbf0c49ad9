"""Opens base models on disk without torch: their checkpoints, fingerprints, and quantized formats."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
