"""A node that applies its members in sequence, each to the layer that the previous ones changed (AdapterHub's
stack, Pfeiffer et al. 2020, arXiv 2007.07779).

    f = f_n( ... f_2(f_1(base)))

For members that only add to the weight the order does not matter, and the stack is their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from ..core.base import Forward
from .base import Folded, Folding, NodeKind, Transform, add_parts
from .registry import NODES


@dataclass(frozen=True)
class StackSettings:
    """A stack has no settings."""

    def check(self, children: int) -> None:
        """Accepts any number of children."""


def _evaluate(settings: StackSettings, children: Sequence[Transform], base: Forward) -> Forward:
    return reduce(lambda inner, child: child(inner), children, base)


def _fold(settings: StackSettings, children: Sequence[Folding], start: Folded) -> Folded:
    return reduce(lambda inner, child: child(inner), children, start)


stack = NODES.register(
    NodeKind(
        name="stack",
        summary="each member changes what the ones before it made of the layer",
        paper="https://arxiv.org/abs/2007.07779",
        formula="f = f_n( ... f_2(f_1(base)))",
        settings=StackSettings,
        join=lambda settings, parts, tensors: add_parts(parts),
        shares=lambda settings, children: [1.0] * children,
        evaluate=_evaluate,
        fold=_fold,
        examples=("stack(a, b)", "stack(sum(0.5*a, b), c)"),
    )
)
