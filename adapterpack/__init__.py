"""adapterpack: train, pack, verify, merge, compose, quantize, export and run adapters for large pretrained
models.

``__init__.pyi`` lists the public names for type checkers, and each is imported on first use, so that looking
at a pack never imports torch.
"""

from typing import Any

import lazy_loader

from .extras import STAGES, needed_by
from .version import VERSION

__version__ = VERSION

_import, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    with needed_by(f"adapterpack.{name}", STAGES.get(name)):
        return _import(name)


__all__ = ["__version__", *_names]  # noqa: PLE0604 - the names are strings
