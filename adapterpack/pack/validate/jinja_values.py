"""Works out from a chat template's text what it assigns to its variables, and which of them are numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from jinja2 import nodes as n

MAX_NESTING = 4
"""Loops inside of each other."""
MAX_VALUES = 500
"""Places at which variables are given values."""
_MAX_WAY = 16
"""Variables that a bound of a number may depend on, one through the other."""
_NUMBERS = frozenset({"abs", "count", "float", "int", "length", "round", "wordcount"})
"""Filters that give a number."""
_COUNTING = frozenset({"count", "find", "index", "rfind", "rindex"})
"""Methods that do."""
_POSITIONS = frozenset({"depth", "depth0", "index", "index0", "length", "revindex", "revindex0"})
"""What a loop counts."""
_PLAIN = frozenset({"lower", "trim", "upper"})
"""Filters that a block may go through."""


class Costly(Exception):
    """What a template can do out of proportion: the line that does it, and why."""

    def __init__(self, node: Any, why: str) -> None:
        super().__init__(why)
        self.line = node.lineno


class Scope(NamedTuple):
    """Where an expression stands: its macro and the loops around it, which have variables of their own."""

    macro: str = ""
    loops: tuple[Any, ...] = ()


class Value(NamedTuple):
    """A value that a variable is given, at ``node``: an expression, or what the statements of a list write; with ``part`` one of its items
    after the other."""

    node: Any
    given: Any
    scope: Scope
    part: bool = False


class Values:
    """Variable -> what it is given. A macro's own variables have its name before theirs; ``name()`` is what a macro writes."""

    def __init__(self, tree: Any) -> None:
        self.macros = {macro.name: macro for macro in tree.find_all(n.Macro)}
        self.targets = {name: _targets(macro.body) for name, macro in self.macros.items()}
        self.of: dict[str, list[Value]] = {}
        self.lasting = set[str]()
        """Those that keep from one time around a loop to the next what they are given there; others begin anew."""
        self._known: dict[int, bool] = {}
        self._bounds: dict[str, int] = {}
        self._collect(tree.body, Scope())
        for name, macro in self.macros.items():
            inside = Scope(name)
            self._collect(macro.body, inside)
            self._add(f"{name}()", Value(macro, macro.body, inside))
            self.lasting.add(f"{name}()")
            for argument, default in zip(reversed(macro.args), reversed(macro.defaults), strict=False):
                self._add(self.key(argument.name, inside), Value(macro, default, inside))
        if sum(map(len, self.of.values())) > MAX_VALUES:
            raise Costly(tree, f"the template gives values to variables in more than {MAX_VALUES} places")
        self.numbers = set(self.of)
        while wrong := {key for key in self.numbers if not all(map(self._counts, self.of[key]))}:
            self.numbers -= wrong
            self._known.clear()

    def key(self, name: str, scope: Scope) -> str:
        """The variable that a name means somewhere."""
        for loop in reversed(scope.loops):
            if name in loop_names(loop):
                return f"{scope.macro}/{name}@{id(loop)}"
        own = scope.macro and (name in self.targets[scope.macro] or name in self.parameters(scope.macro))
        return f"{scope.macro}/{name}" if own else name

    def parameters(self, macro: str) -> list[str]:
        """The names of a macro's parameters."""
        return [argument.name for argument in self.macros[macro].args]

    def variable(self, node: Any, scope: Scope) -> str | None:
        """The variable that an expression is, if the template gives it a value."""
        key = None
        if isinstance(node, n.Name):
            key = self.key(node.name, scope)
        elif isinstance(node, n.Getattr) and isinstance(node.node, n.Name):
            key = f"{self.key(node.node.name, scope)}.{node.attr}"
        return key if key in self.of else None

    def called(self, call: Any) -> Any:
        """The macro that is called, or None."""
        return self.macros.get(call.node.name) if isinstance(call.node, n.Name) else None

    # --- numbers --------------------------------------------------------------------------------------------------------------------------

    def is_number(self, node: Any, scope: Scope) -> bool:
        """Whether an expression is a number, or true or false: nothing that can be long, or be repeated or formatted."""
        if id(node) not in self._known:
            judge = _IS_NUMBER.get(type(node))
            self._known[id(node)] = judge(self, node, scope) if judge else self.variable(node, scope) in self.numbers
        return self._known[id(node)]

    def bound(self, node: Any, scope: Scope, before: frozenset[str] = frozenset()) -> int:
        """The largest number that an expression can be, lengths and places in the chat counted as nothing.

        Raises:
            Costly: nothing bounds it.
        """
        key = self.variable(node, scope)
        if isinstance(node, n.Const) and type(node.value) is int:
            return abs(node.value)
        if is_position(node) or (isinstance(node, n.Filter) and node.name in {"length", "count"}):
            return 0
        if isinstance(node, n.Add | n.Sub):
            return self.bound(node.left, scope, before) + self.bound(node.right, scope, before)
        inner = _NO_LARGER.get(type(node))
        if inner is not None:
            return max(self.bound(getattr(node, name), scope, before) for name in inner if getattr(node, name) is not None)
        if key is None or key in before or key not in self.numbers or len(before) > _MAX_WAY:
            raise Costly(node, "the template counts to a number that nothing bounds")
        if key not in self._bounds:
            given = [(one, value.scope) for value in self.of[key] for one in (value.given.args[:2] if value.part else [value.given])]
            self._bounds[key] = max(self.bound(one, where, before | {key}) for one, where in given)
        return self._bounds[key]

    def _counts(self, value: Value) -> bool:
        if value.part:
            return is_range(value.given)
        return not isinstance(value.given, list) and self.is_number(value.given, value.scope)

    def _both(self, node: Any, scope: Scope) -> bool:
        return self.is_number(node.right, scope) and self.is_number(node.left, scope)

    def _chosen(self, node: Any, scope: Scope) -> bool:
        return self.is_number(node.expr1, scope) and (node.expr2 is None or self.is_number(node.expr2, scope))

    def _filtered(self, node: Any, scope: Scope) -> bool:
        if node.name in {"d", "default"}:
            return node.node is not None and all(self.is_number(one, scope) for one in (node.node, *node.args))
        return node.name in _NUMBERS

    # --- what is given --------------------------------------------------------------------------------------------------------------------

    def _add(self, key: str, value: Value) -> None:
        self.of.setdefault(key, []).append(value)

    def _collect(self, body: Iterable[Any], scope: Scope) -> None:
        for node in body:
            if isinstance(node, n.Macro):
                if scope.macro or scope.loops:
                    raise Costly(node, "the template has a macro inside of another, or of a loop")
                continue
            if isinstance(node, n.For):
                if len(scope.loops) == MAX_NESTING:
                    raise Costly(node, "loops are nested too deeply")
                for name in loop_names(node):
                    self._add(self.key(name, inside_of(node, scope)), Value(node, node.iter, scope, part=True))
            for target, given in _given(node):
                self._give(target, given, scope)
            self._inside(expressions(node), scope)
            for branch in branches(node):
                self._collect(branch, inside_of(node, scope))

    def _give(self, target: Any, given: Any, scope: Scope) -> None:
        for name in every(target, (n.Name, n.NSRef)):
            key = self.key(name.name, scope)
            if isinstance(name, n.NSRef):
                key = f"{key}.{name.attr}"
                self.lasting.add(key)
            elif isinstance(given, n.Call) and isinstance(given.node, n.Name) and given.node.name == "namespace":
                for keyword in given.kwargs:
                    self._add(f"{key}.{keyword.key}", Value(name, keyword.value, scope))
            self._add(key, Value(name, given, scope))

    def _inside(self, found: Iterable[Any], scope: Scope) -> None:
        """What calls give to the parameters of macros, and what is appended to lists."""
        for call in (call for node in found for call in every(node, n.Call)):
            macro = self.called(call)
            if macro is not None:
                given = [*zip(self.parameters(macro.name), call.args, strict=False), *((word.key, word.value) for word in call.kwargs)]
                for name, value in given:
                    self._add(self.key(name, Scope(macro.name)), Value(call, value, scope))
            elif isinstance(call.node, n.Getattr) and call.node.attr == "append":
                longer = n.List([call.node.node, *call.args], lineno=call.lineno)
                attribute = f".{call.node.node.attr}" if isinstance(call.node.node, n.Getattr) else ""
                for name in every(call.node.node, n.Name):
                    key = f"{self.key(name.name, scope)}{attribute}"
                    self._add(key, Value(call, longer, scope))
                    self.lasting.add(key)


def inside_of(node: Any, scope: Scope) -> Scope:
    """The scope of the statements inside of a statement."""
    return scope._replace(loops=(*scope.loops, node)) if isinstance(node, n.For) else scope


def loop_names(loop: Any) -> list[str]:
    """The names of a loop's variables."""
    return [name.name for name in every(loop.target, n.Name)]


def is_position(node: Any) -> bool:
    """Whether an expression is a place in a loop."""
    return isinstance(node, n.Getattr) and isinstance(node.node, n.Name) and node.node.name == "loop" and node.attr in _POSITIONS


def is_range(node: Any) -> bool:
    """Whether an expression is a range of numbers."""
    return isinstance(node, n.Call) and isinstance(node.node, n.Name) and node.node.name == "range"


def every(node: Any, kind: Any) -> Iterator[Any]:
    """The node itself and those inside of it, of a kind."""
    return itertools.chain([node] if isinstance(node, kind) else [], node.find_all(kind))


def branches(node: Any) -> list[list[Any]]:
    """The statements inside of a statement: of those that only one of is executed, each."""
    if isinstance(node, n.If):
        return [node.body, *(branch.body for branch in node.elif_), node.else_]
    if isinstance(node, n.For):
        return [[*node.body, *node.else_]]
    return [node.body] if isinstance(node, n.With | n.AssignBlock) else []


def expressions(node: Any) -> list[Any]:
    """The expressions of a statement, without those of the statements inside of it."""
    if isinstance(node, n.If):
        return [node.test, *(branch.test for branch in node.elif_)]
    if isinstance(node, n.For):
        return [node.iter] if node.test is None else [node.iter, node.test]
    if isinstance(node, n.With):
        return list(node.values)
    return [] if isinstance(node, n.AssignBlock) else [node]


def _given(node: Any) -> list[tuple[Any, Any]]:
    """The targets of a statement that assigns, each with what it is given."""
    if isinstance(node, n.With):
        return list(zip(node.targets, node.values, strict=True))
    if isinstance(node, n.AssignBlock):
        if node.filter is not None and node.filter.name not in _PLAIN:
            raise Costly(node, "the template puts a block through a filter that chats do not need there")
        return [(node.target, node.body)]
    return [(node.target, node.node)] if isinstance(node, n.Assign) else []


def _targets(body: Iterable[Any]) -> set[str]:
    """The names that statements give values to."""
    found = (one for node in body for one in every(node, (n.Assign, n.AssignBlock, n.With)))
    return {name.name for one in found for target in (one.targets if isinstance(one, n.With) else [one.target])
            for name in every(target, n.Name)}


_NO_LARGER: dict[type, tuple[str, ...]] = {
    n.Neg: ("node",), n.Pos: ("node",), n.FloorDiv: ("left",), n.Mod: ("left",), n.CondExpr: ("expr1", "expr2")}
"""Expressions that are no larger than the largest of their parts."""


def _yes(*_: Any) -> bool:
    return True


_IS_NUMBER: dict[type, Callable[[Values, Any, Scope], bool]] = {
    **dict.fromkeys((n.Compare, n.Test, n.Not, n.Sub, n.Div, n.FloorDiv, n.Neg, n.Pos), _yes),
    **dict.fromkeys((n.Add, n.Mul, n.And, n.Or), Values._both),
    n.Const: lambda values, node, scope: not isinstance(node.value, str),
    n.Mod: lambda values, node, scope: values.is_number(node.left, scope),
    n.CondExpr: Values._chosen,
    n.Filter: Values._filtered,
    n.Call: lambda values, node, scope: isinstance(node.node, n.Getattr) and node.node.attr in _COUNTING,
    n.Getattr: lambda values, node, scope: is_position(node) or values.variable(node, scope) in values.numbers,
}
