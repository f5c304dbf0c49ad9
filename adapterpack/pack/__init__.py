"""The pack format: manifest, strict safetensors, digests, base fingerprint and PEFT's layout. Needs neither
torch nor transformers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
