"""The methods that are known: the catalogue, the command line, the schema and the test matrix read this."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import AdapterpackError, UnknownMethod, nearest
from .catalogue import CONFIGS
from .core.base import Method

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

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

    A method of another package that cannot be used is left out; :func:`broken_plugins` says why.

    Example:
        >>> methods()["lora"].traits.low_rank
        True
    """
    for name in CONFIGS:
        built_in(name)
    broken_plugins()
    return dict(sorted(_METHODS.items()))


def broken_plugins() -> tuple[AdapterpackError, ...]:
    """Registers the methods of all other packages; returns an error for each that cannot be used, which names its entry point."""
    errors = []
    for point in _entry_points():
        try:
            _plugin(point)
        except AdapterpackError as error:
            errors.append(error)
    return tuple(errors)


def get(name: str) -> Method:
    """The method of that name; one of another package is imported only if its entry point has that name, or if nothing else has it.

    Raises:
        UnknownMethod: there is none.
        AdapterpackError: it is another package's, and cannot be used; names the entry point.
    """
    if found := built_in(name):
        return found
    for point in _entry_points():
        if point.name == name:
            _plugin(point)
    broken = broken_plugins() if name not in _METHODS else ()  # an entry point may be called otherwise than its method
    if name not in _METHODS:
        hints = [nearest(name, {*CONFIGS, *_METHODS}), *(f"{error.where} cannot be used" for error in broken)]
        raise UnknownMethod("unknown adapter method", found=repr(name), remedy="; ".join(hints))
    return _METHODS[name]


def method_of(config: Any) -> Method:
    """The method whose config class ``config`` is an instance of.

    Raises:
        UnknownMethod: no registered method has that class.
    """
    kind = type(config)
    for method in _likely(kind.__name__):
        if kind is method.config:
            return method
    raise UnknownMethod("no registered method has this config class", found=kind.__name__, remedy=nearest("", _METHODS))


def _likely(config: str) -> Iterator[Method]:
    """Every method, beginning with those whose config class may have that name: others are imported only if somebody goes on looking."""
    for name, own in CONFIGS.items():
        if own == config and (method := built_in(name)):
            yield method
    yield from list(_METHODS.values())
    yield from methods().values()


def _entry_points() -> Iterable[EntryPoint]:
    """Where other packages have their methods, as their metadata says; nothing of them is imported."""
    from importlib.metadata import entry_points  # noqa: PLC0415 - with mail and zip files in its wake, for what a known name never asks

    return entry_points(group=ENTRY_POINT_GROUP)


def _plugin(point: EntryPoint) -> Method:
    """The method behind an entry point, imported and registered.

    Raises:
        AdapterpackError: it cannot be imported, is no method, or has a name that is taken.
    """
    try:
        method = point.load()
        if not isinstance(method, Method):
            raise TypeError(f"it is no Method but a {type(method).__name__}")
        return register(method)
    except (Exception, SystemExit) as error:  # whatever a stranger's module does: it must not end what does not need it
        reason = error.told if isinstance(error, AdapterpackError) else f"{type(error).__name__}: {error}"
        raise AdapterpackError(f"a method of another package cannot be used: {reason}", where=f"{point.name} = {point.value}",
                               remedy="update or uninstall that package") from error
