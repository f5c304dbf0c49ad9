"""The rules by which changes are combined, as values in a table: the catalogue, the command line and the tests read this."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from ...errors import UnknownName, nearest
from .rule import Laws, Rule

__all__ = ["Laws", "Rule", "get", "rules"]

_FAMILIES: Mapping[str, tuple[str, ...]] = {
    "gram": ("cat", "linear", "svd", "task_arithmetic", "negate", "average", "slerp", "nuslerp", "multi_slerp", "karcher", "model_stock"),
    "spectral": ("tsv_m", "iso_c", "iso_cts", "cart", "wudi"),
    "units": ("lora_lego", "robust_merge", "peft_linear", "peft_ties"),
    "dense": ("magnitude_prune", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "sce",
              "pcb", "emr", "consensus", "magmax"),
    "joint": ("knots_ties", "knots_dare_ties", "core_ties", "core_dare_ties"),
    "guided": ("regmean", "fisher", "lorahub", "ziplora"),
}
"""The modules of :mod:`.families`, and the rules that each of them holds."""


def rules() -> dict[str, Rule]:
    """Every rule by name.

    Example:
        >>> sorted(rules())[:2]
        ['average', 'breadcrumbs']
    """
    return {name: get(name) for name in _names()}


def get(name: str) -> Rule:
    """The rule of that name.

    Raises:
        UnknownName: there is none.
    """
    for family, names in _FAMILIES.items():
        if name in names:
            table: tuple[Rule, ...] = import_module(f".families.{family}", __package__).RULES
            return next(rule for rule in table if rule.name == name)
    raise UnknownName("unknown composition rule", found=repr(name), remedy=nearest(str(name), _names()))


def _names() -> list[str]:
    return sorted(name for names in _FAMILIES.values() for name in names)
