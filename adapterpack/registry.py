"""Keeps values that are chosen by name (methods, rules, tasks, formats and so on), this package's own and
those of plugins.
"""

from __future__ import annotations

import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .errors import AdapterpackError, UnknownName, nearest


class Named(Protocol):
    """A value with a name."""

    @property
    def name(self) -> str:
        """The name under which it is registered."""


T = TypeVar("T", bound=Named)


class Registry(Mapping[str, T]):
    """Values of one type by name, in alphabetical order.

    ``what`` describes a value in errors. The modules of ``package`` register the built-in values when they
    are imported; other packages bring theirs by entry points of ``group``. Nothing is imported before its
    name is looked up: first the module of that name, then the entry point of that name, then all others.

    Example:
        >>> from adapterpack.adapter_methods.registry import METHODS
        >>> METHODS["lora"].summary
        'a trained low-rank change added to each frozen layer; rsLoRA by use_rslora'
        >>> METHODS["lroa"]  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        adapterpack.errors.UnknownMethod: unknown adapter method (found 'lroa'). To fix it: did you ...
    """

    def __init__(
        self, what: str, kind: type[T], group: str, package: str, unknown: type[UnknownName] = UnknownName
    ) -> None:
        self.what = what
        self.kind = kind
        self.group = group
        self.package = package
        self._unknown = unknown
        self._values: dict[str, T] = {}
        self._complete = False

    def register(self, value: T) -> T:
        """Adds a value and returns it.

        Raises:
            AdapterpackError: its name is taken, or is not an identifier of lower-case letters, digits, ``_``
                and ``-``.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", value.name):
            raise AdapterpackError(
                f"the name of the {self.what} must be a lower-case identifier",
                found=repr(value.name),
                remedy="rename it",
            )
        if self._values.setdefault(value.name, value) is not value:
            raise AdapterpackError(
                f"two values have the same name: {self.what}", where=value.name, remedy="rename one of them"
            )
        return value

    def __getitem__(self, name: str) -> T:
        """Returns the value with that name.

        Raises:
            UnknownName: there is none; the error suggests the nearest names.
            AdapterpackError: it is another package's, and cannot be used.
        """
        value = self.find(name)
        if value is None:
            broken = [f"{error.where} cannot be used" for error in self.broken()]
            raise self._unknown(
                f"unknown {self.what}",
                found=repr(name),
                remedy="; ".join([nearest(str(name), self), *broken]),
            )
        return value

    def find(self, name: str) -> T | None:
        """Returns the value with that name, or None.

        Raises:
            AdapterpackError: it is another package's, and cannot be used.
        """
        if (
            name not in self._values
            and name.isidentifier()
            and find_spec(f"{self.package}.{name}") is not None
        ):
            import_module(f"{self.package}.{name}")
        if name not in self._values:
            self._import_own()
        for point in _points(self.group) if name not in self._values else ():
            if point.name == name:
                self._load(point)
        # The value of an entry point may have another name, so load all of them.
        if name not in self._values:
            self.broken()
        return self._values.get(name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.find(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """Returns the value with that name, or ``default``."""
        return self.find(name) or default

    def __iter__(self) -> Iterator[str]:
        """Yields the names of all values, without those of plugins that cannot be used; :meth:`broken` says
        why.
        """
        self._import_own()
        self.broken()
        return iter(sorted(self._values))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def known(self) -> Iterator[T]:
        """Yields the values that have been imported so far."""
        yield from list(self._values.values())

    def broken(self) -> tuple[AdapterpackError, ...]:
        """Registers the values of all plugins; returns an error for each that cannot be used, which names its
        entry point.
        """
        errors = []
        for point in _points(self.group):
            try:
                self._load(point)
            except AdapterpackError as error:
                errors.append(error)
        return tuple(errors)

    def _import_own(self) -> None:
        """Imports all modules of the package, which register the built-in values."""
        if not self._complete:
            for module in pkgutil.iter_modules(import_module(self.package).__path__):
                import_module(f"{self.package}.{module.name}")
            self._complete = True

    def _load(self, point: EntryPoint) -> None:
        """Registers the value of an entry point; raises a named error for whatever goes wrong in the
        plugin.
        """
        try:
            value = point.load()
            if isinstance(value, self.kind):
                self.register(value)
            elif point.name not in self._values:
                # If a decorator has registered the value, the entry point may be a plain function.
                raise TypeError(f"it is no {self.kind.__name__} but a {type(value).__name__}")
        # A broken plugin must not end an unrelated command.
        except (Exception, SystemExit) as error:
            reason = (
                error.sentence if isinstance(error, AdapterpackError) else f"{type(error).__name__}: {error}"
            )
            raise AdapterpackError(
                f"the {self.what} of another package cannot be used: {reason}",
                where=f"{point.name} = {point.value}",
                remedy="update or uninstall that package",
            ) from error


def _points(group: str) -> tuple[EntryPoint, ...]:
    """Returns the entry points of a group, as installed now."""
    return _points_in(group, tuple((folder, _changed(folder)) for folder in sys.path))


@lru_cache(maxsize=64)
def _points_in(group: str, path: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    """Returns the entry points of a group; cached until a folder of ``path`` changes, since reading the
    metadata of a hundred distributions takes 30 ms.
    """
    return tuple(entry_points(group=group))


def _changed(folder: str) -> int:
    """Returns when a folder last changed."""
    try:
        return Path(folder).stat().st_mtime_ns
    except OSError:
        return 0
