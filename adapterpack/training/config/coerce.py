"""Converts configuration values to the types of their fields."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import ConfigError


def typed_value(key: str, value: Any, hint: Any, where: object) -> Any:
    """Returns ``value`` in the field's type.

    YAML reads 1e-4 as a string and has no tuples, and a single name may stand for a list of one.

    Raises:
        ConfigError: it cannot be converted.

    Example:
        >>> typed_value("learning_rate", "1e-4", float, "here"), typed_value("targets", ["q"],
        ...     str | tuple[str, ...], "here")
        (0.0001, ('q',))
    """
    allowed = typing.get_args(hint) if typing.get_origin(hint) in {types.UnionType, typing.Union} else (hint,)
    for kind in allowed:
        try:
            return _as(kind, value)
        except (TypeError, ValueError, OverflowError):
            continue
    names = " or ".join(_words(kind) for kind in allowed if kind is not types.NoneType)
    raise ConfigError(
        "a value of the wrong type",
        where=f"{where}, {key}",
        expected=names,
        found=f"{value!r} ({type(value).__name__})",
    )


def _as(kind: Any, value: Any) -> Any:
    """Converts ``value`` to one type; raises TypeError or ValueError if that is impossible."""
    return _READERS.get(typing.get_origin(kind) or kind, _plain)(kind, value)


def _plain(kind: Any, value: Any) -> Any:
    """Accepts only instances of the type itself; a bool is no int here."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError
    return value


def _number(_: Any, value: Any) -> float:
    """Converts numbers and numeric strings to float."""
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _names(kind: Any, value: Any) -> tuple[Any, ...]:
    """Converts a list, or a single string or whole number, to a tuple of items of the type."""
    item = typing.get_args(kind)[0]
    if isinstance(value, str) or (item is int and not isinstance(value, list | tuple)):
        value = [value]
    if not isinstance(value, list | tuple):
        raise TypeError
    return tuple(_as(item, one) for one in value)


def _table(kind: Any, value: Any) -> dict[Any, Any]:
    """Converts a mapping, key by key and value by value."""
    if not isinstance(value, Mapping):
        raise TypeError
    of_key, of_item = typing.get_args(kind)
    return {_as(of_key, key): _as(of_item, item) for key, item in value.items()}


def _choice(kind: Any, value: Any) -> Any:
    """Accepts one of the words of a Literal; YAML reads an unquoted ``no`` as false."""
    words = typing.get_args(kind)
    word = "no" if value is False else value
    if word not in words:
        raise ValueError
    return word


def _words(kind: Any) -> str:
    """Describes a type in words, for errors."""
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    return _OPEN.get(kind) or _NAMES.get(origin or kind, str(kind))


_READERS: dict[Any, Callable[[Any, Any], Any]] = {
    float: _number,
    tuple: _names,
    Mapping: _table,
    typing.Literal: _choice,
    # any value; lists become tuples
    Any: lambda _, value: tuple(value) if isinstance(value, list) else value,
}
"""Maps a type to the function that converts to it; other types accept only their own instances."""

_NAMES: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list of names",
    Mapping: "names with numbers",
}
_OPEN: dict[Any, str] = {
    tuple[Any, ...]: "a list",
    tuple[int, ...]: "a list of whole numbers",
    Mapping[str, Any]: "a mapping",
    Mapping[str, str]: "names with names",
}
"""Descriptions of types whose items matter more than the container."""
