"""Nodes that give different rows or positions of a batch to different members (AdapterHub's batch_split and
split, Poth et al. 2023, arXiv 2311.11077).

    f(x)[i] = f_e(x)[i]  for the child e whose section contains row, or position, i
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from .. import MASKS, Params, require_whole
from ..core.routers import Fixed
from .base import NodeKind, NodePart, NodeSettings, Parts, mix
from .registry import NODES


@dataclass(frozen=True)
class Stretches(NodeSettings):
    """The number of rows or positions of each child; by position, the last child also gets all that
    follow.
    """

    sizes: tuple[int, ...] = ()

    def check(self, children: int) -> None:
        """Raises ValueError unless every child has a size."""
        if len(self.sizes) != children:
            raise ValueError(
                f"sizes must be {children} whole numbers, one for each child, not {self.sizes!r}"
            )
        for size in self.sizes:
            require_whole("a size", size)


def _join(settings: Stretches, parts: Parts, tensors: Params, by_row: bool) -> NodePart | None:
    masks = tuple(tensors[name] for name in MASKS if name in tensors)
    return mix(parts, lambda down, up, ranks: Fixed(settings.sizes, by_row, masks), absent=True)


batch_split = NODES.register(
    NodeKind(
        name="batch_split",
        summary="the first rows of a batch to the first member, the next to the second, and so on",
        paper="https://arxiv.org/abs/2311.11077",
        formula="f(x)[row] = f_e(x)[row]",
        settings=Stretches,
        join=partial(_join, by_row=True),
        unfoldable="rows of one batch have different members, and a weight is the same for all",
        torch_only=(
            "it counts the rows of the batch: export the packs side by side in a bank, where every row "
            "names its adapter"
        ),
        examples=("batch_split(a, b, sizes=1:2)",),
    )
)
split = NODES.register(
    NodeKind(
        name="split",
        summary="the first positions of every row to the first member, the next to the second, and so on",
        paper="https://arxiv.org/abs/2311.11077",
        formula="f(x)[position] = f_e(x)[position]",
        settings=Stretches,
        join=partial(_join, by_row=False),
        unfoldable="positions have different members, and a weight is the same for all",
        one_pass=True,
        torch_only=(
            "it counts positions from the beginning of a pass, and a graph with a cache begins anew at "
            "every token"
        ),
        examples=("split(a, b, sizes=3:4)",),
    )
)
