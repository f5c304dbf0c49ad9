"""A gate trained at every layer: a mixture of LoRA experts (LoRA-Flow, Wang et al. 2024, arXiv 2402.11455,
section 3, has one per block).

    g = softmax over the k largest of G x + c,   f(x) = base(x) + sum_i g_i D_i x

G and c start at zero, so that all experts have equal weights. The experts are frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .. import Arrays, NonNegativeInt, Params, Random, SoftmaxGate
from .base import NodeKind, NodePart, NodeSettings, Parts, mix
from .registry import NODES


@dataclass(frozen=True)
class GateSettings(NodeSettings):
    """``top_k`` is the number of experts per token (0: all)."""

    top_k: NonNegativeInt = 0


def _join(settings: GateSettings, parts: Parts, tensors: Params) -> NodePart | None:
    return mix(
        parts,
        lambda down, up, ranks: SoftmaxGate(tensors["weight"], settings.top_k or len(ranks), tensors["bias"]),
    )


def _make(settings: GateSettings, parts: Sequence[NodePart], rng: Random) -> Arrays:
    assert parts[0].down is not None
    return {
        "weight": np.zeros((len(parts), parts[0].down.shape[1]), np.float32),
        "bias": np.zeros(len(parts), np.float32),
    }


gate = NODES.register(
    NodeKind(
        name="gate",
        summary="experts mixed token by token, by a trained softmax at every layer",
        paper="https://arxiv.org/abs/2402.11455",
        formula="f(x) = base(x) + sum_i g_i D_i x,  g = softmax over the k largest of G x + c",
        settings=GateSettings,
        join=_join,
        tensors=lambda settings, count, site: {"weight": (count, site.in_features), "bias": (count,)},
        made=_make,
        trained=True,
        examples=("gate(a, b, c, top_k=2)", "sum(a, gate(b, c))"),
    )
)
