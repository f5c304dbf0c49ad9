"""Reads and writes PEFT's adapter folders: the only place that knows PEFT's configuration and tensor
names.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
