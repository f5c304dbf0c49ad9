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
        if _shipped(name)(value):
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
    return _test_of(schema)(value)


_Test = Callable[[Any], bool]


def _test_of(schema: Mapping[str, Any]) -> _Test:
    """The schema as a function, so that what it says is looked up once and not at every value."""
    tests = []
    for keyword, argument in schema.items():
        if keyword in _NOTES:
            continue
        rule = _RULES.get(keyword)
        if rule is None:
            raise _OutsideVocabulary(keyword)
        tests.append(rule(argument, schema))
    if len(tests) == 1:
        return tests[0]

    def every(value: Any) -> bool:
        for test in tests:  # noqa: SIM110 - a generator takes twice as long
            if not test(value):
                return False
        return True

    return every


@cache
def _shipped(name: str) -> _Test:
    return _test_of(resources.schema(name))


def _type(argument: Any, _: Any) -> _Test:
    tests = [_TYPES[name] for name in ([argument] if isinstance(argument, str) else argument)]
    return tests[0] if len(tests) == 1 else lambda value: any(test(value) for test in tests)


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


def _properties(argument: Any, _: Any) -> _Test:
    inner = [(key, _test_of(schema)) for key, schema in argument.items()]

    def test(value: Any) -> bool:
        if isinstance(value, dict):
            for key, fitting in inner:
                if key in value and not fitting(value[key]):
                    return False
        return True

    return test


def _additional(argument: Any, schema: Mapping[str, Any]) -> _Test:
    known = schema.get("properties", {}).keys()
    if isinstance(argument, bool):
        return lambda value: not isinstance(value, dict) or argument or value.keys() <= known
    fitting = _test_of(argument)
    return lambda value: not isinstance(value, dict) or all(fitting(value[key]) for key in value.keys() - known)


def _each(kind: type[list[Any]] | type[dict[str, Any]]) -> Callable[[Any, Any], _Test]:
    """A keyword whose schema holds of all that a list or, by its keys, an object consists of."""

    def rule(argument: Any, _: Any) -> _Test:
        fitting = _test_of(argument)
        return lambda value: not isinstance(value, kind) or all(fitting(item) for item in value)

    return rule


def _any(argument: Any, _: Any) -> _Test:
    tests = [_test_of(inner) for inner in argument]
    return lambda value: any(test(value) for test in tests)


def _pattern(argument: Any, _: Any) -> _Test:
    # Every pattern is anchored; but Python's "$" would let a newline at the end pass, which the schema's "$" does not.
    matches = _compiled(argument).fullmatch
    return lambda value: not isinstance(value, str) or matches(value) is not None


@cache
def _compiled(expression: str) -> re.Pattern[str]:
    return re.compile(expression)


def _is(kind: type | tuple[type, ...], holds: Callable[[Any, Any], bool]) -> Callable[[Any, Any], _Test]:
    """A keyword that says something of one kind of value only."""
    return lambda argument, _: lambda value: not isinstance(value, kind) or isinstance(value, bool) or holds(argument, value)


_RULES: dict[str, Callable[[Any, Any], _Test]] = {
    "type": _type,
    "const": lambda argument, _: lambda value: _same(argument, value),
    "enum": lambda argument, _: lambda value: any(_same(choice, value) for choice in argument),
    "anyOf": _any,
    "required": _is(dict, lambda argument, value: value.keys() >= set(argument)),
    "properties": _properties,
    "additionalProperties": _additional,
    "propertyNames": _each(dict),
    "minProperties": _is(dict, lambda argument, value: len(value) >= argument),
    "maxProperties": _is(dict, lambda argument, value: len(value) <= argument),
    "items": _each(list),
    "minItems": _is(list, lambda argument, value: len(value) >= argument),
    "maxItems": _is(list, lambda argument, value: len(value) <= argument),
    "uniqueItems": _is(list, lambda argument, value: not argument or _unique(value)),
    "minLength": _is(str, lambda argument, value: len(value) >= argument),
    "maxLength": _is(str, lambda argument, value: len(value) <= argument),
    "pattern": _pattern,
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
