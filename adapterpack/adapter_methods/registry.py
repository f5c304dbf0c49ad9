"""The methods that are known: the catalogue, the command line, the schema and the test matrix read this."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from ..errors import AdapterpackError, UnknownMethod, nearest
from .catalogue import CONFIGS
from .core.base import Method

ENTRY_POINT_GROUP = "adapterpack.methods"

_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Adds a method to the catalogue and returns it.

    Raises:
        AdapterpackError: another method has that name, or a manifest could not hold it.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", method.name):
        raise AdapterpackError("a method's name must be a lower-case identifier", found=repr(method.name), remedy="rename it")
    if built_in(method.name) not in (None, method) or _METHODS.setdefault(method.name, method) is not method:
        raise AdapterpackError("two methods have the same name", where=method.name, remedy="rename one of them")
    return method


def built_in(name: str) -> Method | None:
    """The registered method of that name, or the one of the catalogue, registered now: its file is imported when it is first asked for."""
    if name not in _METHODS and name in CONFIGS:
        _METHODS[name] = getattr(import_module(f"{__package__}.{name}"), name)
    return _METHODS.get(name)


def methods() -> dict[str, Method]:
    """Every registered method by name, those of other packages (entry points ``adapterpack.methods``) included.

    Raises:
        AdapterpackError: another package's method cannot be imported; names the entry point.

    Example:
        >>> methods()["lora"].traits.low_rank
        True
    """
    from importlib.metadata import entry_points  # noqa: PLC0415 - with mail and zip files in its wake, for what a known name never asks

    for name in CONFIGS:
        built_in(name)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name not in _METHODS:
            try:
                method = point.load()
            except Exception as error:
                raise AdapterpackError(f"a method of another package cannot be imported: {error}", where=f"{point.name} = {point.value}",
                                       remedy="update or uninstall that package") from error
            register(method)
    return dict(sorted(_METHODS.items()))


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        UnknownMethod: there is none.
    """
    found = built_in(name) or methods().get(name)
    if found is None:
        raise UnknownMethod("unknown adapter method", found=repr(name), remedy=nearest(name, _METHODS))
    return found


def method_of(config: Any) -> Method:
    """The method whose config class ``config`` is an instance of.

    Raises:
        UnknownMethod: no registered method has that class.
    """
    for method in methods().values():
        if type(config) is method.config:
            return method
    raise UnknownMethod("no registered method has this config class", found=type(config).__name__, remedy=nearest("", _METHODS))
