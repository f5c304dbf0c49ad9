"""JSON Schema 2020-12 for the vocabulary that our schemas use: a quick yes or no, and the full library only to word a no."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from .. import resources

_TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer())),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}
_NOTES = frozenset({"$schema", "$id", "title", "description"})


class _OutsideVocabulary(Exception):
    """The schema uses a keyword that the quick check does not have."""


def schema_problem(value: Any, name: str) -> tuple[str, str] | None:
    """The first violation of a shipped schema as (JSON pointer, message), or None.

    ``value`` is what a strict JSON reader gave.
    """
    try:
        if fits(value, resources.schema(name)):
            return None
    except _OutsideVocabulary:
        pass
    return _worded(value, name)


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether ``value`` fits ``schema``; the same answer as a full implementation, for the keywords of the table below.

    Example:
        >>> fits([1, 2], {"type": "array", "items": {"type": "integer", "minimum": 2}})
        False
    """
    for keyword, argument in schema.items():
        if keyword in _NOTES:
            continue
        rule = _RULES.get(keyword)
        if rule is None:
            raise _OutsideVocabulary(keyword)
        if not rule(argument, value, schema):
            return False
    return True


def _type(argument: Any, value: Any, _: Any) -> bool:
    return any(_TYPES[name](value) for name in ([argument] if isinstance(argument, str) else argument))


def _same(one: Any, other: Any) -> bool:
    """Equality as JSON has it: true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)


def _unique(value: list[Any]) -> bool:
    if all(isinstance(item, str) for item in value):
        return len(set(value)) == len(value)
    return not any(_same(one, other) for place, one in enumerate(value) for other in value[:place])


def _properties(argument: Any, value: Any, _: Any) -> bool:
    return not isinstance(value, dict) or all(fits(value[key], inner) for key, inner in argument.items() if key in value)


def _additional(argument: Any, value: Any, schema: Mapping[str, Any]) -> bool:
    if not isinstance(value, dict):
        return True
    extra = value.keys() - schema.get("properties", {}).keys()
    if isinstance(argument, bool):
        return argument or not extra
    return all(fits(value[key], argument) for key in extra)


@cache
def _compiled(expression: str) -> re.Pattern[str]:
    return re.compile(expression)


def _is(kind: type | tuple[type, ...], holds: Callable[[Any, Any], bool]) -> Callable[[Any, Any, Any], bool]:
    """A keyword that says something of one kind of value only."""
    return lambda argument, value, _: not isinstance(value, kind) or isinstance(value, bool) or holds(argument, value)


_RULES: dict[str, Callable[[Any, Any, Any], bool]] = {
    "type": _type,
    "const": lambda argument, value, _: _same(argument, value),
    "enum": lambda argument, value, _: any(_same(choice, value) for choice in argument),
    "anyOf": lambda argument, value, _: any(fits(value, inner) for inner in argument),
    "required": _is(dict, lambda argument, value: all(key in value for key in argument)),
    "properties": _properties,
    "additionalProperties": _additional,
    "propertyNames": _is(dict, lambda argument, value: all(fits(key, argument) for key in value)),
    "minProperties": _is(dict, lambda argument, value: len(value) >= argument),
    "maxProperties": _is(dict, lambda argument, value: len(value) <= argument),
    "items": _is(list, lambda argument, value: all(fits(item, argument) for item in value)),
    "minItems": _is(list, lambda argument, value: len(value) >= argument),
    "maxItems": _is(list, lambda argument, value: len(value) <= argument),
    "uniqueItems": _is(list, lambda argument, value: not argument or _unique(value)),
    "minLength": _is(str, lambda argument, value: len(value) >= argument),
    "maxLength": _is(str, lambda argument, value: len(value) <= argument),
    # Every pattern is anchored; but Python's "$" would let a newline at the end pass, which the schema's "$" does not.
    "pattern": _is(str, lambda argument, value: _compiled(argument).fullmatch(value) is not None),
    "minimum": _is((int, float), lambda argument, value: value >= argument),
    "maximum": _is((int, float), lambda argument, value: value <= argument),
    "exclusiveMinimum": _is((int, float), lambda argument, value: value > argument),
}


def _worded(value: Any, name: str) -> tuple[str, str] | None:
    """As :func:`schema_problem`, by the full library."""
    from jsonschema import Draft202012Validator, ValidationError, validators  # noqa: PLC0415 - costs more than everything else here

    def pattern(_: Any, expression: str, instance: Any, __: Any) -> Iterator[ValidationError]:
        if isinstance(instance, str) and not _compiled(expression).fullmatch(instance):
            yield ValidationError(f"{instance!r} does not match {expression!r}")

    strict = validators.extend(Draft202012Validator, {"pattern": pattern})  # type: ignore[no-untyped-call]
    errors = strict(resources.schema(name)).iter_errors(value)
    first = min(errors, key=lambda error: list(map(str, error.absolute_path)), default=None)
    return None if first is None else (_pointer(first.absolute_path), first.message[:300])


def _pointer(path: Any) -> str:
    """A JSON pointer (RFC 6901)."""
    return "/" + "/".join(str(part).replace("~", "~0").replace("/", "~1") for part in path)
