"""The registry of adapter methods by name; the catalogue, the command line, the manifest's schema and the
test matrix read it.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from ..errors import AdapterpackError, UnknownMethod, nearest
from ..registry import Registry
from . import Method

METHODS: Registry[Method] = Registry(
    "adapter method", Method, "adapterpack.methods", "adapterpack.adapter_methods", UnknownMethod
)
"""Method name -> :class:`Method`. Each file of this folder registers the method it defines."""


def register(method: Method) -> Method:
    """Adds a method to the catalogue and returns it.

    Raises:
        AdapterpackError: another method has that name, or a manifest could not hold it.
    """
    return METHODS.register(method)


def methods() -> dict[str, Method]:
    """Lists every adapter method, including those of other packages (entry points ``adapterpack.methods``).

    A method of another package that cannot be used is left out; :func:`broken_plugins` says why.

    Example:
        >>> methods()["lora"].traits.low_rank
        True
    """
    return dict(METHODS)


def broken_plugins() -> tuple[AdapterpackError, ...]:
    """Returns one error for each method of another package that cannot be loaded; each error names the entry
    point.
    """
    return METHODS.broken()


def get(name: str) -> Method:
    """Returns the method called ``name``.

    Raises:
        UnknownMethod: no method has that name.
        AdapterpackError: the method belongs to another package and cannot be loaded; the error names the
            entry point.
    """
    return METHODS[name]


def method_of(config: Any) -> Method:
    """Returns the method whose config class is exactly the class of ``config``.

    Plugins of other packages are imported only if no method that is already loaded has this config class.

    Raises:
        UnknownMethod: no registered method has that class.
    """
    kind = type(config)
    # Methods that are already loaded come first, because iterating `values()` imports every plugin.
    for method in chain(METHODS.known(), METHODS.values()):
        if method.config is kind:
            return method
    raise UnknownMethod(
        "no registered method has this config class", found=kind.__name__, remedy=nearest("", METHODS)
    )
