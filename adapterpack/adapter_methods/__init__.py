"""The adapter methods (LoRA, DoRA, IA3 ...), one file each, with the building blocks in ``core/`` and the
registry that lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
