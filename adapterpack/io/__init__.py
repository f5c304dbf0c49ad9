"""Reads and writes bytes on disk safely: atomic outputs, hashes, locks, safetensors, strict JSON and plain
YAML.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
