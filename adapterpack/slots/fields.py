"""All fields for which a site can have a slot, with their axes and neutral values.

An axis is either a width of the site (:func:`widths`) or free: the adapter's own rank, number of experts,
length or labels, for which a slot has room up to a maximum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..bundle import MappedSite
from . import blocks, prompt_kv, prompt_rows, routes
from .precision import ABSENT, convert

RANK = "rank"
TURN = "turn"
LABELS = "labels"
"""The free axes of layers."""
EXPERTS = "experts_"
"""The prefix of the fields of a stack of experts."""


class SlotField(NamedTuple):
    """The names of a field's ``axes``, and the ``neutral`` value, which fills the slot of an adapter without
    this field.
    """

    axes: tuple[str, ...]
    neutral: float = 0.0

    @property
    def free(self) -> tuple[int, ...]:
        """The indices of the axes along which an adapter may be shorter than its slot."""
        return tuple(place for place, axis in enumerate(self.axes) if axis not in FIXED)


FIXED = frozenset({"experts", "in", "out", "heads", "key_heads", "head_dim"})
"""The axes that are widths of the base model."""


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
    **{
        field: SlotField(tuple({"n": "out", "r": branch}[axis] for axis in blocks.LEAVES[leaf]))
        for field, (branch, leaf) in blocks.FIELDS.items()
    },
    **{
        f"{route.name}_{leaf}": SlotField(
            tuple(route.axes[axis] for axis in routes.LEAVES[leaf]), float(ABSENT) if leaf == "bias" else 0.0
        )
        for route in routes.BRANCHES.values()
        for leaf in route.leaves
    },
    **{
        field: SlotField(axes, float(ABSENT) if field == "attended_absent" else 0.0)
        for field, axes in prompt_kv.LEAVES.items()
    },
    **{field: SlotField(axes) for field, axes in prompt_rows.LEAVES.items()},
    f"{EXPERTS}down": SlotField(("experts", "in", RANK)),
    f"{EXPERTS}up": SlotField(("experts", RANK, "out")),
    f"{EXPERTS}delta": SlotField(("experts", "in", "out")),
}
"""Field -> its axes and its neutral value."""
LEAST: dict[str, int] = {prompt_kv.LENGTH: 1, **{route.experts: 1 for route in routes.BRANCHES.values()}}
"""Free axis -> its least length: 1 where a softmax runs along the axis, else 0."""
ROUTED = frozenset(
    {
        prompt_rows.LENGTH,
        *(name for route in routes.BRANCHES.values() for name in (route.name, route.experts)),
    }
)
"""Free axes that get the length which the exported packs need, independent of a bank's largest rank."""


def widths(site: MappedSite) -> dict[str, int]:
    """Returns the axes of a site with a fixed width, and their widths."""
    fixed = {"in": site.in_features, "out": site.out_features, "experts": site.stack}
    heads = site.heads
    return (
        fixed
        if heads is None
        else {**fixed, "heads": heads.count, "key_heads": heads.key_heads, "head_dim": heads.width}
    )


def is_looked_up(field: str, site: MappedSite) -> bool:
    """Whether a graph looks a slot up by adapter and entry or expert: one set of values for each adapter, not
    for each row, as these would be too large.
    """
    return site.kind == "experts" or (site.kind == "lookup" and field == "down")


def extents(field: str, site: MappedSite, free: Callable[[str], int | str]) -> list[Any]:
    """Returns the shape of a slot: the site's widths, and ``free(axis)`` for every free axis."""
    fixed = widths(site)
    return [fixed[axis] if axis in FIXED else free(axis) for axis in FIELDS[field].axes]


def nothing(field: str, site: MappedSite) -> np.ndarray:
    """Returns the neutral values of a slot, with every free axis at its least length; a head has as many
    labels as the base's.
    """
    shape = extents(field, site, lambda axis: site.out_features if axis == LABELS else LEAST.get(axis, 0))
    return np.full(shape, neutral(field, site.dtype), site.dtype)


def neutral(field: str, dtype: str) -> np.ndarray:
    """Returns the neutral value of a field, in the float type of the graph."""
    return convert(np.array(FIELDS[field].neutral, np.float32), dtype, field)
