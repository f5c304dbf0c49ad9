"""Allows only those parts of Jinja that chat templates need, and reports every other part."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from jinja2 import nodes as n

from .finding import read_table

MAX_DEPTH = 150
"""How deeply a template's statements and expressions may be nested; a chain of as many sums also counts."""

_WORDS = {name: frozenset(words) for name, words in read_table("jinja_words").items()}
_NODES, _LOADING = (
    tuple(getattr(n, name) for name in sorted(_WORDS[kind])) for kind in ("nodes", "loading_nodes")
)
FUNCTIONS, METHODS, FILTERS, TESTS = (_WORDS[name] for name in ("functions", "methods", "filters", "tests"))
_MAPPED = FILTERS - _WORDS["not_mapped"]
"""Filters whose names may be passed to ``map``."""
_BY_NAME = {"reject": TESTS, "select": TESTS, "map": _MAPPED}
_ATTRIBUTES = frozenset({"rejectattr", "selectattr"})
"""Filters whose first argument is the name of an attribute and whose second is the name of a test."""
_PLAIN_FORMAT = {
    "filter": re.compile(r"(?:[^%]|%[sd%])*"),
    "method": re.compile(r"(?:[^{}]|\{\{|\}\}|\{\w{0,40}\})*"),
}
_SHORT = frozenset({"join", "max", "min", "sort", "sum", "unique"})
"""Filters whose second argument would be the name of an attribute."""
_FORMATS = "the template formats by a text that is no plain constant"
_TIME = re.compile(r"(?:[^%]|%-?[A-Za-z%])*")


class TooDeep(Exception):
    """The template's statements or expressions are nested too deeply."""


def walk_nodes(over: Callable[[Iterable[n.Node], str], Iterator[n.Node]], tree: n.Node) -> list[n.Node]:
    """Returns every node of a template; ``over`` iterates while there is time.

    Raises:
        TooDeep: the nodes are nested too deeply.
    """
    left = [(tree, 0)]

    def each() -> Iterator[n.Node]:
        while left:
            node, depth = left.pop()
            if depth > MAX_DEPTH:
                raise TooDeep(f"it is nested more than {MAX_DEPTH} levels deep")
            # An explicit stack, because recursion over an untrusted tree could exhaust Python's.
            left.extend((child, depth + 1) for child in node.iter_child_nodes())
            yield node

    return list(over(each(), "the chat template"))


class Word(NamedTuple):
    """A part of a template that chats do not need. ``inner``: it may reach Python internals behind the
    values; ``statement``: it is a statement.
    """

    line: int
    message: str
    inner: bool
    statement: bool = False


def word_problems(nodes: Iterable[Any]) -> Iterator[Word]:
    """Yields every node that a chat template does not need."""
    nodes = list(nodes)
    macros = {node.name for node in nodes if isinstance(node, n.Macro)}
    for node in nodes:
        if not isinstance(node, _NODES):
            kind = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(node).__name__).lower()
            said = f"the template uses what chats do not need: {kind}"
            yield Word(node.lineno, said, isinstance(node, _LOADING), statement=isinstance(node, n.Stmt))
        elif message := _message(node, macros):
            yield Word(
                node.lineno,
                message,
                isinstance(node, n.Getattr | n.Getitem | n.Const | n.Name) or "reaches" in message,
            )


def _message(node: Any, macros: set[str]) -> str | None:
    look = next((look for kind, look in _LOOKS.items() if isinstance(node, kind)), None)
    return None if look is None else look(node, macros)


def _attribute(node: Any, _: set[str]) -> str | None:
    return f"the template touches the attribute '{node.attr:.80}'" if _is_internal(node.attr) else None


def _constant(node: Any, _: set[str]) -> str | None:
    internal = isinstance(node.value, str) and re.search(r"__[a-z]{1,40}__", node.value)
    return "the template holds the name of an internal attribute" if internal else None


def _name(node: Any, _: set[str]) -> str | None:
    return f"the template uses '{node.name}'" if node.name in _WORDS["globals"] else None


def _loop(node: Any, _: set[str]) -> str | None:
    return "the template has a loop that calls itself" if node.recursive else None


def _test(node: Any, _: set[str]) -> str | None:
    return None if node.name in TESTS else f"the template uses the test '{node.name:.80}'"


def _is_internal(name: Any) -> bool:
    return not isinstance(name, str) or name.startswith("_") or name in _WORDS["internal"]


def _item(node: Any, _: set[str]) -> str | None:
    argument = node.arg
    if isinstance(argument, n.Const) and str(argument.value).startswith("__"):
        return f"the template touches the item '{argument.value!s:.80}'"
    left: list[Any] = [argument] if isinstance(argument, n.Add | n.Concat) else []
    while left:
        part = left.pop()
        if isinstance(part, n.Concat) or (isinstance(part, n.Const) and isinstance(part.value, str)):
            return "the template puts the name of an item together"
        left.extend(part.iter_child_nodes() if isinstance(part, n.Add) else ())
    return None


def constant(node: Any) -> Any:
    """Returns the value of a constant node, None for any other node."""
    return node.value if isinstance(node, n.Const) else None


def _filter(node: Any, _: set[str]) -> str | None:
    name = node.name
    arguments = [constant(argument) for argument in node.args]
    attributes = [constant(keyword.value) for keyword in node.kwargs if keyword.key == "attribute"]
    attributes += arguments[:1] if name in _ATTRIBUTES | {"sum"} else []
    reaches = any(not isinstance(one, str) or any(map(_is_internal, one.split("."))) for one in attributes)
    if name not in FILTERS or reaches:
        return (
            f"the template reaches attributes through the filter '{name}'"
            if reaches or name == "attr"
            else (f"the template uses the filter '{name:.80}'")
        )
    by_name = arguments[1:2] if name in _ATTRIBUTES else arguments[:1] if name in _BY_NAME else []
    if any(one not in _BY_NAME.get(name, TESTS) for one in by_name):
        return f"the filter '{name}' names another by a name that chats do not need: {by_name[0]!r:.80}"
    if _spread(node) or (name in _SHORT and len(arguments) > 1):
        return f"the filter '{name}' has more arguments than chats need"
    if name == "format" and not _fits(_PLAIN_FORMAT["filter"], constant(node.node)):
        return _FORMATS
    return None


def _call(node: Any, macros: set[str]) -> str | None:
    called = node.node
    if isinstance(called, n.Name):
        wrong = called.name not in FUNCTIONS | macros
        plain = called.name != "strftime_now" or (
            len(node.args) == 1 and _fits(_TIME, constant(node.args[0]))
        )
    else:
        wrong = not isinstance(called, n.Getattr) or called.attr not in METHODS
        plain = wrong or called.attr != "format" or _fits(_PLAIN_FORMAT["method"], constant(called.node))
    if wrong or _spread(node):
        return f"the template calls '{getattr(called, 'attr', getattr(called, 'name', '?'))!s:.80}'"
    return None if plain else _FORMATS


_LOOKS: dict[type, Callable[[Any, set[str]], str | None]] = {
    n.Getattr: _attribute, n.Getitem: _item, n.Const: _constant, n.Name: _name, n.For: _loop,
    n.Filter: _filter, n.Test: _test, n.Call: _call,
}  # fmt: skip


def _spread(node: Any) -> bool:
    return node.dyn_args is not None or node.dyn_kwargs is not None


def _fits(pattern: re.Pattern[str], text: Any) -> bool:
    return isinstance(text, str) and pattern.fullmatch(text) is not None
