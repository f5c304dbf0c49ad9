"""Adds the weighted changes of several adapters: computes the slot values of one adapter that has the effect
of all.

Low-rank factors are concatenated, ``[down_1 down_2]`` and ``[w_1 up_1; w_2 up_2]``, so that their product is
exactly the sum of the products. Vectors over inputs or outputs are added as deviations from their neutral
value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..bundle import SiteMap
from ..errors import Unsupported
from . import blocks
from .fields import EXPERTS, FIELDS
from .values import Values, in_slots


class NotASum(Unsupported):
    """The changes of several adapters have no sum that the graph could compute."""

    code = "not-a-sum"


class Summand(NamedTuple):
    """One adapter of a sum: its name, its values by slot, and its weight."""

    name: str
    values: Values
    weight: float


class SumRule(NamedTuple):
    """How one field of several adapters is combined: concatenated along the axis ``lie``, or added (None). Of
    the two factors of a product only one is ``weighted``.
    """

    lie: int | None = None
    weighted: bool = True


_FIRST = SumRule(1, weighted=False)
_SECOND = SumRule(0)
RULES: dict[str, SumRule] = {
    "down": _FIRST,
    "up": _SECOND,
    "turn_down": _FIRST,
    "turn_up": _SECOND,
    f"{EXPERTS}down": SumRule(2, weighted=False),
    f"{EXPERTS}up": SumRule(1),
    **dict.fromkeys(("delta", f"{EXPERTS}delta", "pre", "turn", "scale", "mix", "shift"), SumRule()),
    **{
        field: rule
        for field, (branch, leaf) in blocks.FIELDS.items()
        if not blocks.BRANCHES[branch].normed
        for rule in [
            {
                "down": _FIRST,
                "down_bias": SumRule(0, weighted=False),
                "up": _SECOND,
                "up_bias": SumRule(),
            }.get(leaf)
        ]
        if rule
    },
}
"""Field -> its rule. Other fields have no sum: a head replaces the base's, and softmax and norm are not
linear.
"""

_STAGES: tuple[frozenset[str], ...] = tuple(
    map(frozenset, ({"pre"}, {"turn", "turn_down", "turn_up"}, {"scale"}, {"mix"}))
)
"""Groups of factors that a site applies one after another. Changes add up only if all are in one group."""
_AFTER = frozenset({"scale", "mix"})
_ADDED = frozenset({"down", "up", "delta"})
"""Fields that multiply the output of a layer, and fields that are added to the output before that."""


def add_changes(parts: Sequence[Summand], sites: SiteMap) -> Values:
    """Returns the values of the weighted sum of the changes, in the dtypes of the sites' slots.

    Raises:
        NotASum: changes at one site multiply each other, or have no sum.
        Unsupported: a number is too large for its slot.

    Example:
        >>> one, two = ({"q.down": np.full((2, 1), number), "q.up": np.ones((1, 2))} for number in (1.0, 2.0))
        >>> both = add_changes([Summand("a", one, 0.5), Summand("b", two, -1.0)], {})
        >>> (both["q.down"] @ both["q.up"]).tolist()
        [[-1.5, -1.5], [-1.5, -1.5]]
    """
    names = dict.fromkeys(name for part in parts for name in part.values)
    by_site: dict[str, set[str]] = {}
    for name in names:
        path, _, field = name.rpartition(".")
        by_site.setdefault(path, set()).add(field)
    for path, fields in by_site.items():
        _require_sum(path, fields, parts)
    return in_slots(
        {
            name: _sum(
                name.rpartition(".")[2],
                [(part.values[name], part.weight) for part in parts if name in part.values],
            )
            for name in names
        },
        sites,
    )


def _require_sum(path: str, fields: set[str], parts: Sequence[Summand]) -> None:
    stages = [stage & fields for stage in _STAGES if stage & fields]
    unknown = sorted(field for field in fields if field not in RULES)
    if unknown or len(stages) > 1 or (fields & _AFTER and fields & _ADDED):
        names = [part.name for part in parts if any(f"{path}.{field}" in part.values for field in fields)]
        raise NotASum(
            "the changes of these adapters cannot be added",
            where="adapters",
            found=f"{', '.join(unknown or sorted(fields))} of {', '.join(names)} at {path}",
            remedy="name adapters of plain low rank, or one of these alone",
        )


def _sum(field: str, given: Sequence[tuple[np.ndarray, float]]) -> np.ndarray:
    rule = RULES[field]
    if rule.lie is not None:
        arrays = [
            array.astype(np.float32) * (np.float32(weight) if rule.weighted else 1) for array, weight in given
        ]
        return np.concatenate(arrays, axis=rule.lie)
    # A scale of 1 changes nothing, so deviations from 1 are added, not the scales themselves.
    neutral = np.float32(FIELDS[field].neutral)
    total = sum(
        (weight * (array.astype(np.float64) - neutral) for array, weight in given), np.float64(neutral)
    )
    return np.asarray(total, np.float32)
