"""JSON Schema 2020-12 for the vocabulary that our schemas use: a quick yes or no, and where a no is first met and why.

Both take time and memory in proportion to the value, whatever it is: the value is a stranger's.
"""

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
_NOTES = frozenset({"$schema", "$id", "$defs", "title", "description"})


class _OutsideVocabulary(Exception):
    """The schema uses a keyword that this module does not have."""


def schema_problem(value: Any, name: str) -> tuple[str, str] | None:
    """The first violation of a shipped schema as (JSON pointer, message), or None.

    ``value`` is what a strict JSON reader gave.
    """
    return None if _shipped(name)(value) else _worded(value, resources.schema(name))


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether ``value`` fits ``schema``; the same answer as a full implementation, for the keywords of the table below.

    Example:
        >>> fits([1, 2], {"type": "array", "items": {"type": "integer", "minimum": 2}})
        False
    """
    return _Compiler(schema).test_of(schema)(value)


class _Compiler:
    """Schemas as functions, so that what they say is looked up once and not at every value; ``root`` is what references start from."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._referred: dict[str, _Test] = {}

    def test_of(self, schema: Mapping[str, Any]) -> _Test:
        """The test of a schema: the tests for values of each kind."""
        tests: dict[type, list[_Test]] = {kind: [] if kind in _allowed(schema) else [_never] for kind in _KINDS}
        if float in _allowed(schema) and "number" not in schema.get("type", "number"):
            tests[float].append(float.is_integer)
        for keyword, argument in schema.items():
            if keyword in _NOTES or keyword == "type":
                continue
            rule = _RULES.get(keyword)
            if rule is None:
                raise _OutsideVocabulary(keyword)
            test = rule.test(argument, schema, self)
            for kind in rule.kinds:
                tests[kind].append(test)

        def every(value: Any) -> bool:
            for test in tests[type(value)]:  # noqa: SIM110 - a generator takes twice as long
                if not test(value):
                    return False
            return True

        return every

    def referred(self, reference: str) -> _Test:
        """The test of what a reference leads to, which may hold the reference itself."""
        def test(value: Any) -> bool:
            if reference not in self._referred:
                self._referred[reference] = self.test_of(target(self._root, reference))
            return self._referred[reference](value)

        return test


def target(root: Mapping[str, Any], reference: str) -> Mapping[str, Any]:
    """The schema that a reference ``#/$defs/name`` leads to."""
    found: Mapping[str, Any] = root["$defs"][reference.removeprefix("#/$defs/")]
    return found


def _allowed(schema: Mapping[str, Any]) -> frozenset[type]:
    names = schema.get("type", list(_TYPES))
    return frozenset(kind for name in ([names] if isinstance(names, str) else names) for kind in _TYPES[name])


def _never(_: Any) -> bool:
    return False


@cache
def _shipped(name: str) -> _Test:
    schema = resources.schema(name)
    return _Compiler(schema).test_of(schema)


def _key(value: Any) -> Any:
    """Something that can be hashed and is equal for values that are equal as JSON has it: 1 is 1.0, and true is not 1."""
    if isinstance(value, list):
        return list, tuple(map(_key, value))
    if isinstance(value, dict):
        return dict, frozenset((key, _key(item)) for key, item in value.items())
    return (bool, value) if isinstance(value, bool) else value


def _enum(argument: Any, *_: Any) -> _Test:
    choices = frozenset(map(_key, argument))
    return lambda value: _key(value) in choices


def _properties(argument: Any, _: Any, compiler: _Compiler) -> _Test:
    inner = [(key, compiler.test_of(schema)) for key, schema in argument.items()]

    def test(value: Any) -> bool:
        for key, fitting in inner:  # noqa: SIM110 - as above
            if key in value and not fitting(value[key]):
                return False
        return True

    return test


def _additional(argument: Any, schema: Mapping[str, Any], compiler: _Compiler) -> _Test:
    known = schema.get("properties", {}).keys()
    if isinstance(argument, bool):
        return lambda value: argument or value.keys() <= known
    fitting = compiler.test_of(argument)
    return lambda value: all(fitting(value[key]) for key in value.keys() - known)


def _each(argument: Any, _: Any, compiler: _Compiler) -> _Test:
    """A schema that holds of all that a list or, by its keys, an object consists of."""
    fitting = compiler.test_of(argument)
    return lambda value: all(map(fitting, value))


def _any(argument: Any, _: Any, compiler: _Compiler) -> _Test:
    tests = [compiler.test_of(inner) for inner in argument]
    return lambda value: any(test(value) for test in tests)


def _required(argument: Any, *_: Any) -> _Test:
    names = frozenset(argument)
    return lambda value: names <= value.keys()


def _pattern(argument: Any, *_: Any) -> _Test:
    # Every pattern is anchored; but Python's "$" would let a newline at the end pass, which the schema's "$" does not.
    matches = re.compile(argument).fullmatch
    return lambda value: matches(value) is not None


class _Rule(NamedTuple):
    """A keyword: the kinds of values that it says something of, and the test for such a value, of its argument, the schema that it stands
    in, and what compiles the schemas in its argument. ``says`` is why a value fails, of the value and the argument."""

    kinds: tuple[type, ...]
    test: Callable[[Any, Any, _Compiler], _Test]
    says: Callable[[Any, Any], str] = lambda value, argument: f"{value!r:.100} is not allowed here"


_NUMBERS = (int, float)
_RULES: dict[str, _Rule] = {
    "const": _Rule(_KINDS, lambda argument, *_: lambda value: _key(value) == _key(argument),
                   lambda value, argument: f"{value!r:.100} is not {argument!r}"),
    "enum": _Rule(_KINDS, _enum, lambda value, argument: f"{value!r:.100} is not one of {argument!r:.180}"),
    "required": _Rule((dict,), _required, lambda value, argument: f"{next(key for key in argument if key not in value)!r} is missing"),
    "minProperties": _Rule((dict,), lambda argument, *_: lambda value: len(value) >= argument,
                           lambda value, argument: f"{len(value)} fields are fewer than {argument}"),
    "maxProperties": _Rule((dict,), lambda argument, *_: lambda value: len(value) <= argument,
                           lambda value, argument: f"{len(value)} fields are more than {argument}"),
    "minItems": _Rule((list,), lambda argument, *_: lambda value: len(value) >= argument,
                      lambda value, argument: f"{len(value)} items are fewer than {argument}"),
    "maxItems": _Rule((list,), lambda argument, *_: lambda value: len(value) <= argument,
                      lambda value, argument: f"{len(value)} items are more than {argument}"),
    "uniqueItems": _Rule((list,), lambda argument, *_: lambda value: not argument or len(set(map(_key, value))) == len(value),
                         lambda value, argument: "an item stands there twice"),
    "minLength": _Rule((str,), lambda argument, *_: lambda value: len(value) >= argument,
                       lambda value, argument: f"{value!r:.100} is shorter than {argument} characters"),
    "maxLength": _Rule((str,), lambda argument, *_: lambda value: len(value) <= argument,
                       lambda value, argument: f"{value!r:.100} is longer than {argument} characters"),
    "pattern": _Rule((str,), _pattern, lambda value, argument: f"{value!r:.100} does not match {argument!r}"),
    "minimum": _Rule(_NUMBERS, lambda argument, *_: lambda value: value >= argument,
                     lambda value, argument: f"{value!r:.100} is less than {argument}"),
    "maximum": _Rule(_NUMBERS, lambda argument, *_: lambda value: value <= argument,
                     lambda value, argument: f"{value!r:.100} is more than {argument}"),
    "exclusiveMinimum": _Rule(_NUMBERS, lambda argument, *_: lambda value: value > argument,
                              lambda value, argument: f"{value!r:.100} is not more than {argument}"),
    "properties": _Rule((dict,), _properties),
    "additionalProperties": _Rule((dict,), _additional),
    "propertyNames": _Rule((dict,), _each),
    "items": _Rule((list,), _each),
    "anyOf": _Rule(_KINDS, _any),
    "$ref": _Rule(_KINDS, lambda argument, _, compiler: compiler.referred(argument)),
}
"""Keyword -> what it means; those that only say what is inside stand last, since a value is looked at before what it holds."""


def _worded(value: Any, root: Mapping[str, Any]) -> tuple[str, str]:
    """Where a value that does not fit its schema first fails, outer values before inner ones, and why."""
    compiler, path, schema = _Compiler(root), list[str](), root
    tests: dict[int, _Test] = {}

    def fitting(item: Any, its: Mapping[str, Any]) -> bool:
        if id(its) not in tests:
            tests[id(its)] = compiler.test_of(its)
        return tests[id(its)](item)

    while True:
        schemas = [*_chosen(value, schema, root)]
        for one in schemas:
            if problem := _own(value, one, compiler):
                return _pointer(path), problem
        inner = ((key, item, its) for one in schemas for key, item, its in _inside(value, one) if not fitting(item, its))
        found = next(inner, None)
        if found is None:
            return _pointer(path), f"{value!r:.100} is of none of the forms that are possible here"
        key, value, schema = found
        path.append(str(key))


def _chosen(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schemas that a value is to fit: the one, where that refers to another, and of alternatives the one of the value's kind."""
    while True:
        yield schema
        if "$ref" in schema:
            schema = target(root, schema["$ref"])
            continue
        possible = [choice for choice in schema.get("anyOf", ()) if type(value) in _allowed(choice)]
        if len(possible) != 1:
            return
        schema = possible[0]


def _own(value: Any, schema: Mapping[str, Any], compiler: _Compiler) -> str | None:
    """What is wrong with a value itself, whatever it holds."""
    kind = type(value)
    if kind not in _allowed(schema) or (kind is float and not value.is_integer() and "number" not in schema.get("type", "number")):
        return f"{value!r:.100} is not of type {schema['type']!r}"
    for keyword, rule in _RULES.items():
        if keyword == "properties":
            break
        if keyword in schema and kind in rule.kinds and not rule.test(schema[keyword], schema, compiler)(value):
            return rule.says(value, schema[keyword])
    if kind is dict:
        if schema.get("additionalProperties") is False and (unknown := sorted(value.keys() - schema.get("properties", {}).keys())):
            return f"{unknown[0]!r:.100} is no field that is known here"
        if names := schema.get("propertyNames"):
            fitting = compiler.test_of(names)
            return next((f"{key!r:.100} is no name that a field can have here" for key in value if not fitting(key)), None)
    return None


def _inside(value: Any, schema: Mapping[str, Any]) -> Iterator[tuple[Any, Any, Mapping[str, Any]]]:
    """What a value holds, and the schema of each."""
    if isinstance(value, list) and "items" in schema:
        yield from ((number, item, schema["items"]) for number, item in enumerate(value))
    elif isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties")
        for key in sorted(value):
            if key in known:
                yield key, value[key], known[key]
            elif isinstance(rest, Mapping):
                yield key, value[key], rest


def _pointer(path: list[str]) -> str:
    """A JSON pointer (RFC 6901)."""
    return "/" + "/".join(part.replace("~", "~0").replace("/", "~1") for part in path)
