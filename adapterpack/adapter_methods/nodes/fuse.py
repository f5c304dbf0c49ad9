"""AdapterFusion: mixes the experts' outputs by a trained attention of every token (Pfeiffer et al. 2021,
arXiv 2005.00247, section 3.2).

    g = softmax over the k largest of (Q x) . (K D_i x),   f(x) = base(x) + sum_i g_i D_i x

Query and key are trained at every layer, the experts are frozen. There is no value matrix, as in AdapterHub's
static fusion. K starts at zero, so that all experts have equal weights, and K receives the first gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from msgspec import Meta

from .. import Arrays, NonNegativeInt, Params, Random
from ..core.routers import Attention
from .base import NodeKind, NodePart, NodeSettings, Parts, mix
from .registry import NODES

QUERY, KEY = "query", "key"


@dataclass(frozen=True)
class Fuse(NodeSettings):
    """``size`` is the width of query and key, ``top_k`` the number of experts per token (0: all)."""

    size: Annotated[int, Meta(ge=1, le=1 << 14)] = 32
    top_k: NonNegativeInt = 0


def _join(settings: Fuse, parts: Parts, tensors: Params) -> NodePart | None:
    # (Q x) . (K up down x) = (up^T K^T Q x) . (down x): folding K and Q into one matrix keeps the keys
    # narrow.
    return mix(
        parts,
        lambda down, up, ranks: Attention(
            (up.T @ tensors[KEY].T) @ tensors[QUERY], down, ranks, settings.top_k or len(ranks)
        ),
    )


def _make(settings: Fuse, parts: Sequence[NodePart], rng: Random) -> Arrays:
    part = parts[0]
    assert part.down is not None and part.up is not None
    n, m = part.down.shape[1], part.up.shape[0]
    query = rng.standard_normal((settings.size, n)) / np.sqrt(n)
    return {QUERY: query.astype(np.float32), KEY: np.zeros((settings.size, m), np.float32)}


fuse = NODES.register(
    NodeKind(
        name="fuse",
        summary="experts mixed token by token, by a trained attention over what they answer",
        paper="https://arxiv.org/abs/2005.00247",
        formula="f(x) = base(x) + sum_i g_i D_i x,  g = softmax over the k largest of (Q x) . (K D_i x)",
        settings=Fuse,
        join=_join,
        tensors=lambda settings, count, site: {
            QUERY: (settings.size, site.in_features),
            KEY: (settings.size, site.out_features),
        },
        made=_make,
        trained=True,
        examples=(
            "fuse(a, b, c, size=5)",
            "sum(0.5*a, fuse(b, c, size=3, top_k=1))",
            "fuse(sum(a, -0.5*b), parallel(b, c), size=4)",
        ),
    )
)
