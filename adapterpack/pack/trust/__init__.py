"""Detached signatures of packs: keys, signed statements, envelopes, and the keys that a runtime trusts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
