"""Tenants of a server: API keys, their quotas, and the limits of all requests."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
