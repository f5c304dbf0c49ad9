"""Nodes that sum changes: ``sum`` with weights (task arithmetic, Ilharco et al. 2022, arXiv 2212.04089), and
``parallel``, the average of the adapted outputs.

    f(x) = base(x) + sum_i w_i (f_i(x) - base(x))          parallel: w_i = 1 / n
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import Array, Forward
from ..core.config import require_number
from .base import Folded, Folding, NodeKind, NodeSettings, Transform, add_parts, scale_part, share_evenly
from .registry import NODES


@dataclass(frozen=True)
class SumSettings(NodeSettings):
    """One weight per child, of any sign; an empty tuple means a weight of 1 for each."""

    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        # 1 and 1.0 mean the same tree, which must be written as the same bytes
        weights = tuple(require_number("a weight", weight) for weight in self.weights)
        object.__setattr__(self, "weights", weights)

    def check(self, children: int) -> None:
        """Raises ValueError unless every child has a weight."""
        if self.weights and len(self.weights) != children:
            raise ValueError(
                f"there must be one weight for each of the {children} children, not {len(self.weights)}"
            )


def _evaluate(weights: Sequence[float], children: Sequence[Transform], base: Forward) -> Forward:
    def forward(x: Array) -> Array:
        y = base(x)
        return sum(
            (weight * (child(base)(x) - y) for weight, child in zip(weights, children, strict=True)), start=y
        )

    return forward


def _fold(weights: Sequence[float], children: Sequence[Folding], start: Folded) -> Folded:
    weight, bias = start
    total, offset = weight, bias
    for share, child in zip(weights, children, strict=True):
        changed, moved = child(start)
        total = total + share * (changed - weight)
        if moved is not bias and moved is not None:
            step = share * (moved if bias is None else moved - bias)
            offset = step if offset is None else offset + step
    return total, offset


def _make_sum(weights_of: Callable[[Any, int], list[float]], **about: Any) -> NodeKind:
    """Returns the kind of node that sums the changes of its children with these weights."""
    return NodeKind(
        join=lambda settings, parts, tensors: add_parts(
            [
                None if part is None else scale_part(part, weight)
                for part, weight in zip(parts, weights_of(settings, len(parts)), strict=True)
            ]
        ),
        shares=weights_of,
        evaluate=lambda settings, children, base: _evaluate(
            weights_of(settings, len(children)), children, base
        ),
        fold=lambda settings, children, start: _fold(weights_of(settings, len(children)), children, start),
        **about,
    )


weighted_sum = NODES.register(
    _make_sum(
        lambda settings, children: list(settings.weights) or [1.0] * children,
        name="sum",
        summary="the changes added up, each with a weight of any sign",
        paper="https://arxiv.org/abs/2212.04089",
        formula="f(x) = base(x) + sum_i w_i (f_i(x) - base(x))",
        settings=SumSettings,
        examples=("sum(a, b)", "sum(0.7*a, -0.3*b, c)", "sum(0.5*sum(a, -2*b), sum(c), 0.25*a)"),
    )
)
parallel = NODES.register(
    _make_sum(
        share_evenly,
        name="parallel",
        summary="the outputs of the adapted layers, averaged",
        paper="https://arxiv.org/abs/2007.07779",
        formula="f(x) = 1/n sum_i f_i(x)",
        settings=NodeSettings,
        examples=("parallel(a, b, c)", "parallel(a, sum(0.5*b, c))"),
    )
)
