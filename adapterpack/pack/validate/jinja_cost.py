"""Bounds what a chat template can do and write from its text alone: no more than in proportion to the chat, whatever the chat is.

A form says how large a value can be: how many characters or items of it are the template's own, how often the chat can be in it, and how
often the values of variables. What lasts from one time around a loop to the next, and grows by itself, alone or through others, may be
once in its new value: then it grows by the same each time. Twice, and it doubles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jinja2 import nodes as n

from .jinja_parts import Form, Parts, either, repeated
from .jinja_values import Costly, Scope, Value, Values, branches, every, expressions, inside_of, is_range
from .jinja_words import constant

MAX_COUNT = 10_000
"""The largest number of a repetition or of a range."""
MAX_TEXT = 1 << 20
"""Characters and items of the template's own in a value, and statements that are executed, loops over the chat counted once."""
MAX_COPIES = 1 << 12
"""How often the chat can be in a value."""
_MAX_INDENT = 64
MAX_MADE = 12
"""Lists and mappings of the template's own in what a macro is given that calls itself."""
_TEXT, _CHAT, _MADE = "#text", "#chat", "#made"


def cost_problems(tree: Any) -> Iterator[tuple[int, str]]:
    """The first thing that a template can do or write out of proportion: its line, and why."""
    try:
        _Cost(tree).check()
    except Costly as found:
        yield found.line, str(found)


class Size(NamedTuple):
    """How large a value can be: characters and items of the template's own, copies of the chat, lists and mappings of its own."""

    text: float = 0.0
    copies: float = 0.0
    made: float = 0.0

    def __add__(self, other: tuple[float, ...]) -> Size:  # type: ignore[override]
        return Size(*map(sum, zip(self, other, strict=True)))

    def times(self, count: float) -> Size:
        """So often."""
        return Size(*(one * count for one in self))

    def or_larger(self, other: Size) -> Size:
        """Each the larger of two."""
        return Size(*map(max, self, other))


class _Cost:
    """The sizes of a template's variables: characters of its own, and copies of the chat."""

    def __init__(self, tree: Any) -> None:
        self._tree, self._values = tree, Values(tree)
        self._parts = Parts(self._values)
        self._sizes: dict[str, Size] = {}
        self._steps: dict[str, float] = {}
        self._inlining: list[str] = []

    def check(self) -> None:
        """Raises Costly for the first thing that is out of proportion."""
        for component in _components({key: self._leads_to(key) for key in self._values.of}):
            self._solve(component)
        self._require(self._tree, self._size(self._written(self._tree.body, Scope())), "the template can write very much")
        self._executed(self._tree.body, Scope())

    def _look(self, node: Any, scope: Scope) -> None:
        """Raises Costly for a part of an expression that is out of proportion, whatever becomes of it."""
        if isinstance(node, n.Mul) and self._values.is_number(node, scope):
            if not any(type(constant(one)) in {int, float} and abs(constant(one)) <= MAX_COUNT for one in (node.left, node.right)):
                raise Costly(node, "the template multiplies two numbers that may be any")
        elif not isinstance(node, n.Filter) or node.node is not None:
            self._require(node, self._size(self._form(node, scope)), "a value can grow very large")

    # --- variables ------------------------------------------------------------------------------------------------------------------------

    def _leads_to(self, key: str) -> set[str]:
        """The variables whose size is part of a variable's, or of how often it is given a value."""
        found = set[str]()
        for value in self._values.of[key]:
            forms = [self._given(value), *(self._form(loop.iter, value.scope) for loop in value.scope.loops)]
            found |= {name.partition("/")[0] if "()/" in name else name for form in forms for name in form}
        return found & self._values.of.keys()

    def _given(self, value: Value) -> Form:
        return self._written(value.given, value.scope) if isinstance(value.given, list) else self._form(value.given, value.scope)

    def _solve(self, component: list[str]) -> None:
        """The sizes of variables that are in each other: the largest that one is given, and what is added to it on the way around."""
        called = [key.removesuffix("()") for key in component if key.endswith("()")]
        if len(called) > 1:
            raise Costly(self._values.macros[called[0]], "macros call each other in a circle")
        lasts = not self._values.lasting.isdisjoint(component)
        largest, added, factor = Size(), Size(), 1.0
        for key in component:
            for value in self._values.of[key]:
                form = self._given(value)
                own = sum(form[name] for name in component) + repeated(form)
                if own > 1 and lasts:
                    raise Costly(value.node, f"'{_plain(key)}' can double with every step")
                size = self._size({name: count for name, count in form.items() if name not in component})
                if own:
                    added += size.times(self._times(value.scope) * max([1.0, *map(self._calls, called)]))
                    factor *= max(1.0, own)
                else:
                    largest = largest.or_larger(size)
        size = (largest + added).times(factor)
        self._require(self._values.of[component[0]][0].node, size, f"'{_plain(component[0])}' can grow very large")
        self._sizes |= dict.fromkeys(component, size)

    def _calls(self, macro: str) -> float:
        """How often a macro calls itself because of what the template itself gives it: of that, parts are gone into again and again."""
        given = Size()
        for key in self._values.of:
            given = given.or_larger(self._sizes.get(key, Size())) if key.startswith(f"{macro}/") else given
        if given.made > MAX_MADE:
            raise Costly(self._values.macros[macro], "a macro that calls itself is given what the template has put together")
        return given.text

    def _size(self, form: Mapping[str, float]) -> Size:
        total = Size(form.get(_TEXT, 0), form.get(_CHAT, 0), form.get(_MADE, 0))
        for name, count in form.items():
            total += self._sizes.get(name, Size()).times(count)
        return total

    def _require(self, node: Any, size: Size, why: str) -> None:
        if size.text > MAX_TEXT or size.copies > MAX_COPIES:
            raise Costly(node, why)

    def _times(self, scope: Scope, around: Scope | None = None) -> float:
        """How often something is executed because of the template alone: in all of its loops, or in those that are not ``around``."""
        times = 1.0
        for number, loop in enumerate(scope.loops):
            if around is None or number >= len(around.loops):
                times *= max(1.0, self._size(self._form(loop.iter, scope._replace(loops=scope.loops[:number]))).text)
        return times

    # --- statements -----------------------------------------------------------------------------------------------------------------------

    def _written(self, body: Iterable[Any], scope: Scope) -> Form:
        """What statements write: one after the other; of branches, one."""
        total = Form()
        for node in body:
            inside = inside_of(node, scope)
            if isinstance(node, n.Output):
                total += self._sum(node.nodes, scope)
            elif isinstance(node, n.For):
                mark, own = self._parts.mark(node, scope), f"{scope.macro}()"
                # the items of what a macro calls itself for are counted with its calls
                times = 1 if mark and scope.macro in self._parts.recursive else self._times(inside, scope)
                for name, count in self._written([*node.body, *node.else_], inside).items():
                    total[name] += count * (times if not name.startswith(own) else 1 if mark and mark in name else 2)  # type: ignore[assignment]
            elif not isinstance(node, n.AssignBlock):
                total += either(self._written(branch, inside) for branch in branches(node))
        return total

    def _executed(self, body: Iterable[Any], scope: Scope) -> float:
        """How many statements are executed because of the template alone; looks at every expression on the way."""
        total = 0.0
        for node in body:
            if isinstance(node, n.Macro):
                continue
            inside = inside_of(node, scope)
            inner = max((self._executed(branch, inside) for branch in branches(node)), default=0)
            total += 1 + inner * self._times(inside, scope)
            for one in (one for expression in expressions(node) for one in every(expression, (n.Mul, n.Mod, n.Filter, n.Call))):
                self._look(one, scope)
                macro = self._values.called(one) if isinstance(one, n.Call) else None
                if macro is not None and macro.name not in self._steps:
                    self._steps[macro.name] = 0  # what it calls itself for are parts of what it was given
                    self._steps[macro.name] = self._executed(macro.body, Scope(macro.name))
                total += 0 if macro is None else self._steps[macro.name]
            if total > MAX_TEXT:
                raise Costly(node, "the template's own loops go very far")
        return total

    # --- expressions ----------------------------------------------------------------------------------------------------------------------

    def _form(self, node: Any, scope: Scope) -> Form:
        """How large the value of an expression can be."""
        if self._values.is_number(node, scope):
            return Form()
        key = self._values.variable(node, scope)
        if key is not None:
            return self._inlined(key) or Form({key: 1})
        return _FORMS.get(type(node), _Cost._all)(self, node, scope)

    def _sum(self, nodes: Iterable[Any], scope: Scope, text: int = 0) -> Form:
        total = Form({_TEXT: text})
        for node in nodes:
            total += self._form(node, scope)
        return total

    def _all(self, node: Any, scope: Scope) -> Form:
        items, made = list(node.iter_child_nodes()), isinstance(node, n.List | n.Tuple | n.Dict)
        return self._sum(items, scope, len(items) if made else 0) + Form({_MADE: int(made and bool(items))})

    def _either(self, nodes: Iterable[Any], scope: Scope) -> Form:
        return either(self._form(node, scope) for node in nodes if node is not None)

    def _name(self, node: Any, scope: Scope) -> Form:
        return Form() if node.name == "loop" or node.name in self._values.macros else Form({_CHAT: 1})

    def _inlined(self, key: str) -> Form | None:
        """What a macro's own variable holds that is given a call of the macro once: the part that it is called for is to be known."""
        value, *others = self._values.of[key]
        macro = self._values.macros.get(value.scope.macro)
        if "/" not in key or others or isinstance(value.given, list) or value.part or key in self._inlining:
            return None
        if not any(self._values.called(call) is macro for call in every(value.given, n.Call)):
            return None
        self._inlining.append(key)
        form = self._form(value.given, value.scope)
        self._inlining.pop()
        return form

    def _multiplied(self, node: Any, scope: Scope) -> Form:
        for value, times in ((node.left, node.right), (node.right, node.left)):
            count = self._values.bound(times, scope) if self._values.is_number(times, scope) else MAX_COUNT + 1
            if count <= MAX_COUNT:
                return _scaled(self._form(value, scope), max(count, 1))
        raise Costly(node, "the template repeats something very often, or as often as what may be any number")

    def _formatted(self, node: Any, scope: Scope) -> Form:
        raise Costly(node, "the template formats by what may be any text")

    def _filtered(self, node: Any, scope: Scope) -> Form:
        name, given = node.name, list(node.args)
        if name == "map" and given:
            name, given = constant(given[0]), given[1:]
        named = {keyword.key: keyword.value for keyword in node.kwargs}
        inner = Form() if node.node is None else self._form(node.node, scope)
        if name in {"default", "d"}:
            return either([inner, self._sum([*given[:1], *named.values()], scope)])
        if name == "join":
            return self._joined(inner, [*given, named.get("d")][0], scope)
        if name == "replace":
            return self._replaced(inner, [*given, named.get("old"), named.get("new")], scope)
        if name in {"tojson", "indent"}:
            return _scaled(inner, 1 + _width(node, given[0] if given else named.get("indent", named.get("width")), int(name == "indent")))
        return inner + self._sum([*given, *named.values()], scope) if name in {"format", "sum"} else inner

    def _joined(self, inner: Form, put: Any, scope: Scope) -> Form:
        """Items with a text between them."""
        text = "" if put is None else constant(put)
        return _scaled(inner, 1 + len(text)) if isinstance(text, str) else _scaled(inner + self._form(put, scope), 2)

    def _replaced(self, inner: Form, put: list[Any], scope: Scope) -> Form:
        """A text with another one in place of some of it."""
        old, new = map(constant, put[:2])
        if isinstance(old, str) and isinstance(new, str):
            return _scaled(inner, max(1.0, len(new) / len(old) if old else 1 + len(new)))
        return _scaled(inner + self._sum([one for one in put[:2] if one is not None], scope), 2)

    def _called(self, node: Any, scope: Scope) -> Form:
        values, macro = [*node.args, *(keyword.value for keyword in node.kwargs)], self._values.called(node)
        if macro is not None:
            return Form({self._parts.called(macro, node, scope): 1})
        if isinstance(node.node, n.Name):
            return self._counted(node, scope) if is_range(node) else self._sum(values, scope, 64)
        inner, method = self._form(node.node.node, scope), node.node.attr
        if method == "join":
            return self._joined(self._sum(values, scope), node.node.node, scope)
        if method == "replace":
            return self._replaced(inner, [*values, None, None], scope)
        if method in {"get", "cycle"}:
            return either([inner, self._sum(values[method == "get" :], scope)])
        return inner + self._sum(values, scope) if method == "format" else inner

    def _counted(self, node: Any, scope: Scope) -> Form:
        count = sum(self._values.bound(one, scope) for one in node.args[:2])
        if count > MAX_COUNT or node.kwargs:
            raise Costly(node, "the template counts very far")
        return Form({_TEXT: count, _CHAT: 1})


_FORMS: dict[type, Callable[[_Cost, Any, Scope], Form]] = {
    n.TemplateData: lambda cost, node, scope: Form({_TEXT: len(node.data)}),
    n.Const: lambda cost, node, scope: Form({_TEXT: len(node.value)}),
    n.Name: _Cost._name,
    n.Getattr: lambda cost, node, scope: cost._form(node.node, scope),
    n.Getitem: lambda cost, node, scope: cost._form(node.node, scope),
    n.CondExpr: lambda cost, node, scope: cost._either((node.expr1, node.expr2), scope),
    n.And: lambda cost, node, scope: cost._either((node.left, node.right), scope),
    n.Or: lambda cost, node, scope: cost._either((node.left, node.right), scope),
    n.Mul: _Cost._multiplied,
    n.Mod: _Cost._formatted,
    n.Filter: _Cost._filtered,
    n.Call: _Cost._called,
}


def _scaled(form: Form, times: float) -> Form:
    return Form({name: count * times for name, count in form.items()})  # type: ignore[misc]


def _width(node: Any, given: Any, default: int) -> int:
    """How far an indent goes."""
    value = default if given is None else constant(given)
    width = len(value) if isinstance(value, str) else value
    if isinstance(given, n.Const) and value is None:
        return 0
    if type(width) is not int or not 0 <= width <= _MAX_INDENT:
        raise Costly(node, "the template indents very far, or as far as what may be any number")
    return width


def _plain(key: str) -> str:
    """A variable as its template calls it."""
    return key.rpartition("/")[2].partition("@")[0]


def _components(graph: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """The strongly connected components of a graph, each after those that it leads to (Tarjan 1972), without recursion."""
    number, low, stack, done = dict[str, int](), dict[str, int](), list[str](), set[str]()
    for root in graph:
        left = [(root, iter(graph[root]))] if root not in number else []
        while left:
            key, others = left[-1]
            if key not in number:
                number[key] = low[key] = len(number)
                stack.append(key)
            other = next(others, None)
            if other is None:
                left.pop()
                if left:
                    low[left[-1][0]] = min(low[left[-1][0]], low[key])
                if low[key] == number[key]:
                    at = stack.index(key)
                    yield stack[at:]
                    done.update(stack[at:])
                    del stack[at:]
            elif other not in number:
                left.append((other, iter(graph[other])))
            elif other not in done:
                low[key] = min(low[key], number[other])
