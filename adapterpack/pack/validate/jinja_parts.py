"""Macros that call themselves: for parts of what they were given, for each part once, so that they end where the chat's own data does.

A part is named by the way to it: the number of a macro's parameter and, behind a colon, its name and the keys that follow, each with a dot
behind it; ``*`` and a number stand for the items that a loop goes over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from jinja2 import nodes as n

from .jinja_values import Scope, Values, every, loop_names
from .jinja_words import constant

Form = Counter[str]
"""How often something is in a value: the chat, characters of the template's own, variables, parts of what a macro is given."""
_KEEPING = frozenset({"d", "default", "dictsort", "items", "list", "reverse", "sort", "unique", "values"})
"""Filters and methods that give the items of what they are given."""


class Parts:
    """What the macros of a template call themselves for."""

    def __init__(self, values: Values) -> None:
        self._values = values
        self.recursive = {macro.name for macro in values.macros.values() for call in macro.find_all(n.Call) if values.called(call) is macro}

    def mark(self, loop: Any, scope: Scope) -> str | None:
        """What stands in the name of a part for a loop around it, None for a loop that does not go over parts."""
        return None if self._way(loop.iter, scope) is None else f"*{id(loop)}"

    def called(self, macro: Any, call: Any, scope: Scope) -> str:
        """What a form calls a call of a macro: the macro, and of one that calls itself the part that it is called for, if it is one."""
        for number, (name, given) in enumerate(zip(self._values.parameters(macro.name), call.args, strict=False)):
            way = self._way(given, scope) if macro.name == scope.macro else None
            if way is not None and way != f"{name}.":
                return f"{macro.name}()/{number}:{way}"
        return f"{macro.name}()"

    def _way(self, node: Any, scope: Scope) -> str | None:
        """The way to the part of a macro's parameter that an expression is, None if it is none."""
        if isinstance(node, n.Name):
            return self._way_of(node.name, scope)
        if isinstance(node, n.Getattr | n.Getitem):
            part = node.attr if isinstance(node, n.Getattr) else constant(node.arg)
            around = self._way(node.node, scope) if isinstance(part, str) else None
            return None if around is None else f"{around}{part}."
        if isinstance(node, n.Filter) and node.node is not None:
            return self._way(node.node, scope) if node.name in _KEEPING else None
        if isinstance(node, n.Call) and isinstance(node.node, n.Getattr):
            return self._way(node.node.node, scope) if node.node.attr in _KEEPING else None
        names = [name.name for name in every(node, n.Name)] if isinstance(node, n.Dict | n.List | n.Tuple) else []
        of_loop = len(names) == 1 and any(names[0] in loop_names(loop) for loop in scope.loops)
        return self._way_of(names[0], scope) if of_loop else None

    def _way_of(self, name: str, scope: Scope) -> str | None:
        for number, loop in enumerate(scope.loops):
            if self._values.key(name, scope).endswith(f"@{id(loop)}"):
                around = self._way(loop.iter, scope._replace(loops=scope.loops[:number]))
                same = all(value.part for value in self._values.of[self._values.key(name, scope)])
                return f"{around}*{id(loop)}.{loop_names(loop).index(name)}." if same and around is not None else None
        own = scope.macro and name in self._values.parameters(scope.macro) and name not in self._values.targets[scope.macro]
        return f"{name}." if own else None


def either(forms: Iterable[Form]) -> Form:
    """The larger of several, of everything that is in them."""
    most = Form()
    for form in forms:
        most |= form
    return most


def repeated(form: Form) -> float:
    """How often a macro calls itself for the same part at most."""
    return max((count for name, count in form.items() if "()/" in name), default=0)
