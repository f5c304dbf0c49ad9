"""Serves a bundle over HTTP: OpenAI's routes, an adapter for each request, API keys, fair scheduling, limits.
Needs the extra ``serve``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
