"""The rules by which changes are combined, as values in a table: the catalogue, the command line and the tests read this."""

from __future__ import annotations

from .rule import RULES, Laws, Rule

__all__ = ["Laws", "Rule", "get", "rules"]


def rules() -> dict[str, Rule]:
    """Every rule by name, those of other packages (entry points ``adapterpack.rules``) included.

    Example:
        >>> sorted(rules())[:2]
        ['average', 'breadcrumbs']
    """
    return dict(RULES)


def get(name: str) -> Rule:
    """The rule of that name.

    Raises:
        UnknownName: there is none.
    """
    return RULES[name]
