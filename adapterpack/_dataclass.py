"""``dataclass(frozen=True)`` of the standard library, made in a quarter of the time: a command begins by making dozens of them.

The standard one compiles six functions for every class; here ``__init__`` alone is compiled, and the others are the same functions for all.
The module :mod:`dataclasses` takes what comes out for its own (``fields``, ``replace``, a standard dataclass on top of one of these), and
type checkers see the standard decorator.
"""

from __future__ import annotations

import dataclasses
from dataclasses import MISSING, Field, FrozenInstanceError
from operator import attrgetter
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass  # noqa: PLC0414 - the name that others import
else:
    def dataclass(*, frozen, kw_only=False):
        """A frozen dataclass; ``frozen`` is said for whoever reads it, and for type checkers."""
        if not frozen:
            raise TypeError("such a dataclass is frozen")
        return lambda cls: _made(cls, kw_only)


class _Functions:
    """What the classes are given: every function but ``__init__``."""

    _compared: Any
    _shown: tuple[str, ...]

    def __eq__(self, other: object) -> bool:
        return self._compared(self) == self._compared(other) if other.__class__ is self.__class__ else NotImplemented

    def __hash__(self) -> int:
        return hash(self._compared(self))

    @recursive_repr()
    def __repr__(self) -> str:
        return f"{self.__class__.__qualname__}({', '.join([f'{name}={getattr(self, name)!r}' for name in self._shown])})"

    def __setattr__(self, name: str, value: object) -> None:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"cannot delete field {name!r}")


_SHARED = {name: vars(_Functions)[name] for name in ("__eq__", "__hash__", "__repr__", "__setattr__", "__delattr__")}


@dataclasses.dataclass(frozen=True)
class _Standard:
    """A frozen dataclass of the standard library, for the mark that it leaves on one."""


def _made(cls: Any, kw_only: bool) -> Any:
    """``cls`` as a frozen dataclass."""
    own = _own_fields(cls, kw_only)
    for name, each in own.items():
        if each.default is not MISSING:
            setattr(cls, name, each.default)
        elif name in cls.__dict__:
            delattr(cls, name)
    known = [base.__dict__.get("__dataclass_fields__", {}) for base in reversed(cls.__mro__)]
    cls.__dataclass_fields__ = {name: each for some in (*known, own) for name, each in some.items()}
    cls.__dataclass_params__ = _Standard.__dataclass_params__  # type: ignore[attr-defined]
    fields = dataclasses.fields(cls)
    cls.__match_args__ = tuple([each.name for each in fields if not each.kw_only])  # type: ignore[misc]
    cls._compared = attrgetter("__class__", *[each.name for each in fields if each.compare])
    cls._shown = tuple([each.name for each in fields if each.repr])
    for name, function in {"__init__": _initialiser(cls, fields), **_SHARED}.items():
        if name not in cls.__dict__:
            setattr(cls, name, function)
    return cls


def _own_fields(cls: Any, kw_only: bool) -> dict[str, Field[Any]]:
    """The fields that ``cls`` itself declares, as the standard library reads them off a class of which it makes no functions."""
    annotations = cls.__annotations__
    defaults = {name: cls.__dict__[name] for name in annotations if name in cls.__dict__}
    bare = type(cls.__name__, (), {"__module__": cls.__module__, "__doc__": cls.__name__, "__annotations__": annotations, **defaults})
    read: Any = dataclasses.dataclass(init=False, repr=False, eq=False, match_args=False, kw_only=kw_only)(bare)
    found: dict[str, Field[Any]] = read.__dataclass_fields__
    return found


def _initialiser(cls: Any, fields: tuple[Field[Any], ...]) -> Any:
    """``__init__``; the names that it needs are no field's.

    It writes past the ``__setattr__`` that forbids it, and not to the instance's dictionary: an instance without one is read faster.
    """
    space: dict[str, Any] = {"__name__": cls.__module__, "__unset__": object(), "__write__": object.__setattr__}
    places, keywords, lines = ["self"], list[str](), list[str]()
    for each in fields:
        name, default, value = each.name, "", each.name
        if each.default is not MISSING:
            default, space[f"__default_{name}__"] = f"=__default_{name}__", each.default
        elif each.default_factory is not MISSING:
            default, space[f"__make_{name}__"] = "=__unset__", each.default_factory
            value = f"__make_{name}__() if {name} is __unset__ else {name}"
        (keywords if each.kw_only else places).append(name + default)
        lines.append(f"__write__(self, {name!r}, {value})")
    if hasattr(cls, "__post_init__"):
        lines.append("self.__post_init__()")
    parameters = ", ".join([*places, "*", *keywords] if keywords else places)
    exec(f"def __init__({parameters}):\n " + "\n ".join(lines or ["pass"]), space)
    function = space["__init__"]
    function.__qualname__ = f"{cls.__qualname__}.__init__"
    return function
