"""Imports a compiled module, and refuses one that was not compiled from the C sources next to it."""

from __future__ import annotations

import warnings
from importlib import import_module
from types import ModuleType

from . import build


class UnusedKernel(UserWarning):
    """A compiled module is there and is not used; its work is done without it, more slowly."""


def load(name: str) -> ModuleType | None:
    """The compiled module of that name; None where nothing was compiled, or where the processor has none of
    its instruction sets.

    None, too, with an :class:`UnusedKernel` warning, where it was compiled from other sources, as after a
    ``git pull``, or for another machine.
    """
    try:
        module = import_module(f".{name}", __package__)
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        problem = f"cannot be loaded here ({error})"
    else:
        if getattr(module, "SOURCE_HASH", None) == build.source_hash():
            return module if module.sets() else None
        problem = "was compiled from other sources than those next to it"
    warnings.warn(
        f"adapterpack's compiled module {name} {problem}; its work is done without it, more slowly. To fix "
        f"it: install adapterpack again, or run python {build.__file__}",
        UnusedKernel,
        stacklevel=2,
    )
    return None
