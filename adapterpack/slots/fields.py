"""Every field that a site of a graph may have a slot for: its axes by name, and its neutral value.

An axis is either as wide as the site is (:func:`widths`), or free: an adapter's own rank, number of experts,
length or labels, of which a slot has room for the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..bundle.manifest import MappedSite
from . import blocks, prompt_kv, prompt_rows, routes
from .precision import ABSENT, convert

RANK, TURN, LABELS = "rank", "turn", "labels"
"""The free axes of layers."""


class SlotField(NamedTuple):
    """``axes`` by name, and the value in the slot of an adapter that has no such part."""

    axes: tuple[str, ...]
    neutral: float = 0.0

    @property
    def free(self) -> tuple[int, ...]:
        """The axes, by number, along which an adapter may be shorter than its slot."""
        return tuple(place for place, axis in enumerate(self.axes) if axis not in FIXED)


FIXED = frozenset({"in", "out", "heads", "key_heads", "head_dim"})
"""The axes that are the base's own widths."""


def _of_blocks() -> dict[str, SlotField]:
    return {
        field: SlotField(tuple({"n": "out", "r": branch}[axis] for axis in blocks.LEAVES[leaf]))
        for field, (branch, leaf) in blocks.FIELDS.items()
    }


def _of_routes() -> dict[str, SlotField]:
    named = {
        field: ({"i": "in", "o": "out", "e": route.experts, "r": route.name}, leaf)
        for field, (route, leaf) in routes.FIELDS.items()
    }
    return {
        field: SlotField(
            tuple(names[axis] for axis in routes.LEAVES[leaf]), float(ABSENT) if leaf == "bias" else 0.0
        )
        for field, (names, leaf) in named.items()
    }


FIELDS: dict[str, SlotField] = {
    "down": SlotField(("in", RANK)),
    "up": SlotField((RANK, "out")),
    "delta": SlotField(("in", "out")),
    "pre": SlotField(("in",), 1.0),
    "turn": SlotField(("in", "in")),
    "turn_down": SlotField(("in", TURN)),
    "turn_up": SlotField((TURN, "in")),
    "scale": SlotField(("out",), 1.0),
    "mix": SlotField(("out", "out")),
    "shift": SlotField(("out",)),
    "head": SlotField(("in", LABELS)),
    "head_bias": SlotField((LABELS,), float(ABSENT)),
    **_of_blocks(),
    **_of_routes(),
    **{
        field: SlotField(axes, float(ABSENT) if field == "attended_absent" else 0.0)
        for field, axes in prompt_kv.LEAVES.items()
    },
    **{field: SlotField(axes) for field, axes in prompt_rows.LEAVES.items()},
}
"""Field -> its axes and its neutral value."""
LEAST: dict[str, int] = {prompt_kv.LENGTH: 1, **{route.experts: 1 for route in routes.BRANCHES.values()}}
"""Free axes whose length must be at least 1, since a softmax goes along them."""
ROUTED = frozenset(
    {
        prompt_rows.LENGTH,
        *(name for route in routes.BRANCHES.values() for name in (route.name, route.experts)),
    }
)
"""Free axes that are as long as the packs of an export need, whatever the largest rank of a bank is."""


def widths(site: MappedSite) -> dict[str, int]:
    """The axes that are as wide as the site is."""
    fixed = {"in": site.in_features, "out": site.out_features}
    heads = site.heads
    return (
        fixed
        if heads is None
        else {**fixed, "heads": heads.count, "key_heads": heads.key_heads, "head_dim": heads.width}
    )


def extents(field: str, site: MappedSite, free: Callable[[str], int | str]) -> list[Any]:
    """The shape of a slot: the widths of the site, and the length that ``free`` gives of every free axis."""
    fixed = widths(site)
    return [fixed[axis] if axis in FIXED else free(axis) for axis in FIELDS[field].axes]


def nothing(field: str, site: MappedSite) -> np.ndarray:
    """A slot without an adapter: every free axis as short as it can be; of a head, as many labels as the
    base's.
    """
    shape = extents(field, site, lambda axis: site.out_features if axis == LABELS else LEAST.get(axis, 0))
    return np.full(shape, neutral(field, site.dtype), site.dtype)


def neutral(field: str, dtype: str) -> np.ndarray:
    """The neutral value of a field, in the float type of the graph."""
    return convert(np.array(FIELDS[field].neutral, np.float32), dtype, field)
