"""JSON Schema 2020-12 for the vocabulary that our schemas use: a quick yes or no, and the full library only to word a no."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from .. import resources

_Test = Callable[[Any], bool]
_KINDS: tuple[type, ...] = (type(None), bool, str, int, float, list, dict)
"""What a strict JSON reader gives, each of exactly this type."""
_TYPES: dict[str, tuple[type, ...]] = {
    "null": (type(None),), "boolean": (bool,), "string": (str,), "integer": (int, float), "number": (int, float), "array": (list,),
    "object": (dict,),
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


def _test_of(schema: Mapping[str, Any]) -> _Test:
    """The schema as a function, so that what it says is looked up once and not at every value: the tests for values of each kind."""
    allowed = schema.get("type", list(_TYPES))
    allowed = [allowed] if isinstance(allowed, str) else allowed
    kinds = {kind for name in allowed for kind in _TYPES[name]}
    tests: dict[type, list[_Test]] = {kind: [] if kind in kinds else [_never] for kind in _KINDS}
    if float in kinds and "number" not in allowed:
        tests[float].append(float.is_integer)
    for keyword, argument in schema.items():
        if keyword in _NOTES or keyword == "type":
            continue
        rule = _RULES.get(keyword)
        if rule is None:
            raise _OutsideVocabulary(keyword)
        test = rule.test(argument, schema)
        for kind in rule.kinds:
            tests[kind].append(test)

    def every(value: Any) -> bool:
        for test in tests[type(value)]:  # noqa: SIM110 - a generator takes twice as long
            if not test(value):
                return False
        return True

    return every


def _never(_: Any) -> bool:
    return False


@cache
def _shipped(name: str) -> _Test:
    return _test_of(resources.schema(name))


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


def _enum(argument: Any, _: Any) -> _Test:
    if all(isinstance(choice, str) for choice in argument):
        choices = frozenset(argument)
        return lambda value: type(value) is str and value in choices
    return lambda value: any(_same(choice, value) for choice in argument)


def _properties(argument: Any, _: Any) -> _Test:
    inner = [(key, _test_of(schema)) for key, schema in argument.items()]

    def test(value: Any) -> bool:
        for key, fitting in inner:  # noqa: SIM110 - as above
            if key in value and not fitting(value[key]):
                return False
        return True

    return test


def _additional(argument: Any, schema: Mapping[str, Any]) -> _Test:
    known = schema.get("properties", {}).keys()
    if isinstance(argument, bool):
        return lambda value: argument or value.keys() <= known
    fitting = _test_of(argument)
    return lambda value: all(fitting(value[key]) for key in value.keys() - known)


def _each(argument: Any, _: Any) -> _Test:
    """A schema that holds of all that a list or, by its keys, an object consists of."""
    fitting = _test_of(argument)
    return lambda value: all(map(fitting, value))


def _any(argument: Any, _: Any) -> _Test:
    tests = [_test_of(inner) for inner in argument]
    return lambda value: any(test(value) for test in tests)


def _required(argument: Any, _: Any) -> _Test:
    names = frozenset(argument)
    return lambda value: names <= value.keys()


def _pattern(argument: Any, _: Any) -> _Test:
    # Every pattern is anchored; but Python's "$" would let a newline at the end pass, which the schema's "$" does not.
    matches = _compiled(argument).fullmatch
    return lambda value: matches(value) is not None


@cache
def _compiled(expression: str) -> re.Pattern[str]:
    return re.compile(expression)


class _Rule(NamedTuple):
    """A keyword: the kinds of values that it says something of, and the test for such a value, of its argument and the schema around."""

    kinds: tuple[type, ...]
    test: Callable[[Any, Any], _Test]


_NUMBERS = (int, float)
_RULES: dict[str, _Rule] = {
    "const": _Rule(_KINDS, lambda argument, _: lambda value: _same(argument, value)),
    "enum": _Rule(_KINDS, _enum),
    "anyOf": _Rule(_KINDS, _any),
    "required": _Rule((dict,), _required),
    "properties": _Rule((dict,), _properties),
    "additionalProperties": _Rule((dict,), _additional),
    "propertyNames": _Rule((dict,), _each),
    "minProperties": _Rule((dict,), lambda argument, _: lambda value: len(value) >= argument),
    "maxProperties": _Rule((dict,), lambda argument, _: lambda value: len(value) <= argument),
    "items": _Rule((list,), _each),
    "minItems": _Rule((list,), lambda argument, _: lambda value: len(value) >= argument),
    "maxItems": _Rule((list,), lambda argument, _: lambda value: len(value) <= argument),
    "uniqueItems": _Rule((list,), lambda argument, _: lambda value: not argument or _unique(value)),
    "minLength": _Rule((str,), lambda argument, _: lambda value: len(value) >= argument),
    "maxLength": _Rule((str,), lambda argument, _: lambda value: len(value) <= argument),
    "pattern": _Rule((str,), _pattern),
    "minimum": _Rule(_NUMBERS, lambda argument, _: lambda value: value >= argument),
    "maximum": _Rule(_NUMBERS, lambda argument, _: lambda value: value <= argument),
    "exclusiveMinimum": _Rule(_NUMBERS, lambda argument, _: lambda value: value > argument),
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
