"""Converts JSON values to typed structs with limits, and reports the value that does not fit."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from ..errors import FormatError

T = TypeVar("T")
PositiveWhole = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]
NonNegative = Annotated[float, Meta(ge=0)]
"""Numbers in file formats and requests: whole ones from 1, whole ones from 0, and any from 0."""
_MISSING = "Object missing required field "


class Misfit(NamedTuple):
    """A value that does not fit its place: its JSON pointer (RFC 6901), and the problem."""

    pointer: str
    message: str


@typing.dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
class FrozenStruct(msgspec.Struct, frozen=True):
    """A struct whose values do not change, as those of all classes that are derived from it."""


class StrictStruct(FrozenStruct):
    """An object of a file format. Reading one takes every field and no other, whatever has a default in
    Python; so does a dataclass.
    """

    def breaches(self) -> Iterator[Misfit]:
        """Yields violations of rules that types cannot express, with pointers relative to this object."""
        return iter(())


class ClosedStruct(StrictStruct, forbid_unknown_fields=True):
    """An object of a request or of a file that people write: a field that it does not have is an error."""


def read(value: Any, kind: type[T], *, newer: bool = False) -> T | Misfit:
    """Converts a value of a strict JSON reader to a struct; returns the struct, or the first misfit.

    ``newer`` ignores unknown fields, which a later version of the format may have added.

    Example:
        >>> class Size(StrictStruct):
        ...     width: typing.Annotated[int, msgspec.Meta(ge=1)] = 1
        >>> read({"width": 3}, Size), read({"width": 0}, Size)
        (Size(width=3), Misfit(pointer='/width', message='expected `int` >= 1, found 0'))
        >>> read({}, Size).message
        "'width' is missing"
    """
    try:
        struct = msgspec.convert(value, kind)
    except msgspec.ValidationError:
        # The fallback is unreachable: conversion has just failed.
        return misfit(value, kind) or Misfit("", "does not fit")
    return _other_fields(value, struct, newer) or struct


def require(
    value: Any, kind: type[T], what: str, where: object, *, newer: bool = False, **hints: str | None
) -> T:
    """Converts like :func:`read` where a value that does not fit is an error, which ``what`` begins.

    Raises:
        FormatError: a value does not fit; the error names its JSON pointer.
    """
    struct = read(value, kind, newer=newer)
    if isinstance(struct, Misfit):
        raise FormatError(f"{what}: {struct.message}", where=f"{where}#{struct.pointer or '/'}", **hints)
    return struct


def misfit(value: Any, kind: Any) -> Misfit | None:
    """Returns the innermost value that does not fit its annotation, or None if all fit."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        for key, item, annotation in _inside(value, kind):
            if inner := misfit(item, annotation):
                return Misfit(f"/{escape_key(key)}{inner.pointer}", inner.message)
        if typing.get_origin(choices := next(_choices(kind))) is typing.Literal:
            expected = ", ".join(map(repr, typing.get_args(choices)))
            return Misfit("", f"expected one of {expected}, found {value!r:.100}{_hint(kind)}")
        what = (str(error).rpartition(" - at ")[0] or str(error)).partition(", got `")[0]
        if what.startswith(_MISSING):
            return Misfit("", f"{what.removeprefix(_MISSING).strip('`')!r} is missing")
        return Misfit("", f"{what[:1].lower()}{what[1:]}, found {value!r:.100}")
    return None


def _hint(kind: Any) -> str:
    """Returns what an annotation adds about other values, in ``Meta(extra={"otherwise": ...})``."""
    extras = (getattr(meta, "extra", None) or {} for meta in getattr(kind, "__metadata__", ()))
    return next((f"; {extra['otherwise']}" for extra in extras if "otherwise" in extra), "")


def _choices(kind: Any) -> Iterator[Any]:
    """Yields each type that an annotation allows, without None and limits."""
    if typing.get_origin(kind) is typing.Annotated:
        yield from _choices(typing.get_args(kind)[0])
    elif typing.get_origin(kind) in (typing.Union, types.UnionType):
        for one in typing.get_args(kind):
            yield from () if one is type(None) else _choices(one)
    else:
        yield kind


def escape_key(key: object) -> str:
    """Escapes a key as a part of a JSON pointer.

    Example:
        >>> escape_key("a/b~c")
        'a~1b~0c'
    """
    return str(key).replace("~", "~0").replace("/", "~1")


def _inside(value: Any, kind: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yields key, item and annotation of everything that a value contains, where the annotation describes
    such a container.
    """
    kinds = list(_choices(kind))
    is_list = isinstance(value, list)
    fitting = (one for one in kinds if is_list is ((typing.get_origin(one) or one) in (tuple, list)))
    kind = next(fitting, kinds[0])
    arguments = typing.get_args(kind)
    origin = typing.get_origin(kind) or kind
    if isinstance(value, list) and origin in (tuple, list):
        yield from ((number, item, arguments[0]) for number, item in enumerate(value))
    elif isinstance(value, dict) and isinstance(origin, type) and issubclass(origin, Mapping):
        hints = (
            dict.fromkeys(value, arguments[1])
            if arguments
            else typing.get_type_hints(kind, include_extras=True)
        )
        yield from ((key, item, _present(hints[key])) for key, item in value.items() if key in hints)
    elif (
        isinstance(value, dict)
        and isinstance(origin, type)
        and (issubclass(origin, StrictStruct) or is_dataclass(origin))
    ):
        hints = typing.get_type_hints(origin, include_extras=True)
        yield from ((name, value[name], hints[name]) for name in _fields(origin) if name in value)


def _present(hint: Any) -> Any:
    """Returns the annotation of a key's value, without NotRequired."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.NotRequired else hint


def _fields(kind: Any) -> tuple[str, ...]:
    """Returns the field names of a struct or a dataclass."""
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) else kind.__struct_fields__


def _other_fields(value: Any, read: Any, newer: bool) -> Misfit | None:
    """Returns the first missing or unknown field of a value compared with the struct read from it, or the
    first violated rule.

    Parts that conversion returned unchanged are not searched.
    """
    if isinstance(read, tuple | list):
        pairs: list[tuple[Any, tuple[Any, Any]]] = list(enumerate(zip(read, value, strict=True)))
    elif isinstance(read, dict | StrictStruct) or is_dataclass(read):
        breaches: Iterator[Misfit] = read.breaches() if hasattr(read, "breaches") else iter(())
        if breach := next(breaches, None):
            return breach
        items = (
            read if isinstance(read, dict) else {name: getattr(read, name) for name in _fields(type(read))}
        )
        if value.keys() != items.keys():
            if missing := [key for key in items if key not in value]:
                return Misfit("", f"{missing[0]!r:.100} is missing")
            if not newer:
                return Misfit("", f"{min(value.keys() - items.keys())!r:.100} is no field that is known here")
        pairs = [(key, (item, value[key])) for key, item in items.items()]
    else:
        return None
    for key, (item, one) in pairs:
        if item is not one and type(item) not in _SCALARS and (inner := _other_fields(one, item, newer)):
            return Misfit(f"/{escape_key(key)}{inner.pointer}", inner.message)
    return None


_SCALARS = frozenset({str, int, float, bool, type(None)})


def find_duplicates(items: Sequence[Any] | None, pointer: str) -> Iterator[Misfit]:
    """Yields a misfit if an item is repeated in a list of strings."""
    if items is not None and len(set(items)) < len(items):
        yield Misfit(pointer, "an item stands there twice")


def breaches_inside(items: object, pointer: str) -> Iterator[Misfit]:
    """Yields the breaches of a list's objects, with pointers that begin with its own; none of what is no
    list.
    """
    for place, item in enumerate(items if isinstance(items, list) else ()):
        yield from (Misfit(f"{pointer}/{place}{inner}", message) for inner, message in item.breaches())


def portable(schema: Any) -> Any:
    """Replaces Python's ``\\Z`` by ``$`` in a generated schema: JSON Schema uses ECMAScript's expressions,
    where ``$`` is the end of the text.

    Example:
        >>> portable({"items": {"pattern": r"^[a-z]+\\Z"}})
        {'items': {'pattern': '^[a-z]+$'}}
    """
    if isinstance(schema, list):
        return [portable(item) for item in schema]
    if isinstance(schema, dict):
        return {
            key: f"{item[:-2]}$"
            if key == "pattern" and isinstance(item, str) and item.endswith("\\Z")
            else portable(item)
            for key, item in schema.items()
        }
    return schema
