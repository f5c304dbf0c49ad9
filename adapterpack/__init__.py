"""adapterpack: train, pack, verify, merge, compose, quantize, export and run adapters for large pretrained models.

The public names are listed once, in ``__init__.pyi``: type checkers read them there, and each is imported on first use, so that looking at
a pack never costs an import of torch.
"""

import lazy_loader

from .version import VERSION

__version__ = VERSION

__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)

__all__ = ["__version__", *_names]  # noqa: PLE0604 - the names are strings
