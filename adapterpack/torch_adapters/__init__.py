"""Holds adapters in torch models: finds the sites that they change, wraps the modules there, and attaches,
saves and detaches adapters.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
