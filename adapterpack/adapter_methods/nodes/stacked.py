"""A node that applies its members in sequence, each to the layer that the previous ones changed (AdapterHub's
stack, Pfeiffer et al. 2020, arXiv 2007.07779).

    f = f_n( ... f_2(f_1(base)))

For members that only add to the weight the order does not matter, and the stack is their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TypeVar

from .base import NodeKind, NodeSettings, add_parts
from .registry import NODES

T = TypeVar("T")


def _apply_in_turn(settings: NodeSettings, children: Sequence[Callable[[T], T]], start: T) -> T:
    return reduce(lambda inner, child: child(inner), children, start)


stack = NODES.register(
    NodeKind(
        name="stack",
        summary="each member changes what the ones before it made of the layer",
        paper="https://arxiv.org/abs/2007.07779",
        formula="f = f_n( ... f_2(f_1(base)))",
        settings=NodeSettings,
        join=lambda settings, parts, tensors: add_parts(parts),
        shares=lambda settings, children: [1.0] * children,
        evaluate=_apply_in_turn,
        fold=_apply_in_turn,
        examples=("stack(a, b)", "stack(sum(0.5*a, b), c)"),
    )
)
