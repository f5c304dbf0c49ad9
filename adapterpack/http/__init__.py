"""Shared parts of the package's HTTP servers: connections, bodies, errors, TLS, files that reload. Needs the
extra ``serve``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
