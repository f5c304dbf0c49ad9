"""Hubs: pulls, pushes and validates packs and bundles on the Hugging Face Hub, and serves a small hub of
one's own.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
