"""Engines: run many requests in one batch, each with its own adapter, and add and remove rows
between steps.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
