"""The methods by name: the catalogue, the command line, the schema and the test matrix read this."""

from __future__ import annotations

from itertools import chain
from typing import Any

from ..errors import AdapterpackError, UnknownMethod, nearest
from ..registry import Registry
from .core.base import Method

METHODS: Registry[Method] = Registry(
    "adapter method", Method, "adapterpack.methods", "adapterpack.adapter_methods", UnknownMethod
)
"""Name -> the method; each file of this folder registers the one that it defines."""


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
    """An error for each method of another package that cannot be used, which names its entry point."""
    return METHODS.broken()


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        UnknownMethod: there is none.
        AdapterpackError: it is another package's, and cannot be used; names the entry point.
    """
    return METHODS[name]


def method_of(config: Any) -> Method:
    """The method whose config class ``config`` is an instance of; methods of other packages are imported only
    if no other has it.

    Raises:
        UnknownMethod: no registered method has that class.
    """
    kind = type(config)
    for method in chain(METHODS.known(), METHODS.values()):
        if method.config is kind:
            return method
    raise UnknownMethod(
        "no registered method has this config class", found=kind.__name__, remedy=nearest("", METHODS)
    )
