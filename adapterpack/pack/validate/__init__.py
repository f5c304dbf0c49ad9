"""The validator of packs: checks in small files, one per group of rules, and a table of all of them in
``registry``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
