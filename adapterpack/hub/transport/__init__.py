"""HTTP to and from a hub: listings, downloads and uploads, with limits of size and time."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
