"""The rules by which changes are combined, as values in a table: the catalogue, the command line and the tests read this."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..errors import ConfigError, UnknownName, nearest
from .space import Factors, stack


class Rule(NamedTuple):
    """How the terms of one site become one change.

    ``needs`` says what the rule looks at: ``G`` inner products of the changes, ``C`` the joint column and row spaces, ``S`` scalings of one
    side, ``D`` every entry of the dense change. ``exact``: the result is what the formula says, without truncation. ``function`` takes the
    site's terms and the rule's parameters by keyword. ``reduce``: its result is brought to its numerical rank.
    """

    name: str
    summary: str
    paper: str
    needs: str
    exact: bool
    function: Callable[..., Factors]
    reduce: bool = True

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The rule's parameters by name, read off its function: whatever is taken by keyword only."""
        found = inspect.signature(self.function).parameters
        return {name: parameter for name, parameter in found.items() if parameter.kind is parameter.KEYWORD_ONLY}

    def arguments(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """Every parameter with its given or default value.

        Raises:
            ConfigError: a parameter that the rule does not have, or one that it needs is missing.
        """
        known, given = self.parameters, dict(params or {})
        for name in given:
            if name not in known:
                raise ConfigError("the rule has no such parameter", where=f"rule {self.name}", found=repr(name),
                                  remedy=nearest(name, known) if known else "leave it out: the rule takes no parameters")
        values = {name: given.get(name, parameter.default) for name, parameter in known.items()}
        for name, value in values.items():
            if value is inspect.Parameter.empty:
                raise ConfigError("the rule needs a parameter", where=f"rule {self.name}", expected=name, remedy=f"give {name}")
        return values


_RULES = (
    Rule(
        name="cat",
        summary="the factors side by side: the weighted sum of the changes, as it stands, of rank sum r_i",
        paper="https://arxiv.org/abs/2212.04089",
        needs="G",
        exact=True,
        function=stack,
        reduce=False,
    ),
    Rule(
        name="linear",
        summary="the weighted sum of the changes (task arithmetic), brought to the smallest rank that holds it",
        paper="https://arxiv.org/abs/2212.04089",
        needs="G",
        exact=True,
        function=stack,
    ),
)


def rules() -> dict[str, Rule]:
    """Every rule by name.

    Example:
        >>> sorted(rules())[:2]
        ['cat', 'linear']
    """
    return {rule.name: rule for rule in sorted(_RULES, key=lambda rule: rule.name)}


def get(name: str) -> Rule:
    """The rule of that name.

    Raises:
        UnknownName: there is none.
    """
    known = rules()
    if name not in known:
        raise UnknownName("unknown composition rule", found=repr(name), remedy=nearest(str(name), known))
    return known[name]
