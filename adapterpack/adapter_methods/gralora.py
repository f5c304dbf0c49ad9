"""GraLoRA: divides the weight into k x k blocks with a low-rank change in each (Jung et al. 2025, arXiv
2505.20355, section 3).

    W'[i, j] = W[i, j] + s B[i, j] A[j, i],   s = alpha / (r + hybrid_r)

i and j count blocks of outputs and of inputs; each pair has rank r / k. ``hybrid_r`` adds a plain LoRA of
that rank with the same s. If k does not divide both widths of a site, the largest divisor of k that does
replaces it (PEFT refuses such sites).

A is stored as ``[k, in/k, r]``: block j, and (i, rank) along the last axis; B as ``[k, r, out/k]``: block i,
and (j, rank). Together they form one change of rank k r, with a block-diagonal A and a B that gives each pair
its own part of the rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from . import (
    MATRICES,
    METHODS,
    NO_EXTRAS,
    TRANSPOSED,
    Array,
    Arrays,
    BlockDiagonal,
    Dense,
    FiniteFloat,
    Method,
    NonNegativeInt,
    NormalForm,
    Params,
    PeftKeys,
    PositiveInt,
    Random,
    RankConfig,
    Shapes,
    Site,
    Traits,
    array_namespace,
    kaiming,
    set_defaults,
)


@dataclass(frozen=True)
class GraLoRA(RankConfig):
    """The hyper-parameters of GraLoRA; ``alpha`` defaults to ``2 r``, and k must divide r.

    Example:
        >>> GraLoRA(r=8, k=2, hybrid_r=4, alpha=6).scale, GraLoRA(r=8, k=2, hybrid_r=4).rank
        (0.5, 20)
    """

    alpha: FiniteFloat | None = None
    k: PositiveInt = 2
    hybrid_r: NonNegativeInt = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r % self.k:
            raise ValueError(f"k must divide r, but {self.k} does not divide {self.r}")
        set_defaults(self, alpha=2.0 * self.r)

    @property
    def scale(self) -> float:
        """``s``, the number that multiplies every block."""
        return float(self.alpha or 0.0) / (self.r + self.hybrid_r)

    @property
    def rank(self) -> int:
        """The largest rank of the entire change: ``k r + hybrid_r``."""
        return self.k * self.r + self.hybrid_r


def _shapes(cfg: GraLoRA, site: Site) -> Shapes:
    k = math.gcd(cfg.k, site.in_features, site.out_features)
    blocks: Shapes = {
        "gralora_A": (k, site.in_features // k, cfg.r),
        "gralora_B": (k, cfg.r, site.out_features // k),
    }
    general = {
        "gralora_A_general": (cfg.hybrid_r, site.in_features),
        "gralora_B_general": (site.out_features, cfg.hybrid_r),
    }
    return {**blocks, **general} if cfg.hybrid_r else blocks


def _init(cfg: GraLoRA, site: Site, rng: Random) -> Arrays:
    shapes = _shapes(cfg, site)
    made = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    blocks, narrow, rank = shapes["gralora_A"]
    made["gralora_A"] = (
        kaiming(rng, (blocks * rank, narrow)).reshape(blocks, rank, narrow).transpose(0, 2, 1).copy()
    )
    if cfg.hybrid_r:
        made["gralora_A_general"] = kaiming(rng, shapes["gralora_A_general"])
    return made


def _normal_form(cfg: GraLoRA, params: Params, site: Site) -> NormalForm:
    A, B = params["gralora_A"], params["gralora_B"]
    xp = array_namespace(A, B)
    down = BlockDiagonal(xp.permute_dims(A, (0, 2, 1))).dense()
    up = _as_matrix(B)
    if cfg.hybrid_r:
        down = xp.concat([down, params["gralora_A_general"]], axis=0)
        up = xp.concat([up, params["gralora_B_general"]], axis=1)
    return NormalForm(down=Dense(down), up=Dense(cfg.scale * up))


def _as_matrix(B: Array) -> Array:
    """Returns B ``[i, (j, rank), out/k]`` as a matrix ``[(i, out/k), (j, i', rank)]`` that is zero where i'
    differs from i.
    """
    xp = array_namespace(B)
    k, rank, wide = B.shape
    block_rank = rank // k
    parts = xp.permute_dims(xp.reshape(B, (k, k, block_rank, wide)), (0, 3, 1, 2))[:, :, :, None, :]
    # Multiplying by the identity keeps each pair's own part of the rank and zeros the others, without a
    # scatter.
    diagonal = xp.eye(k, dtype=B.dtype, device=B.device)[:, None, None, :, None]
    return xp.reshape(parts * diagonal, (k * wide, k * k * block_rank))


_KEYS = PeftKeys(
    GraLoRA,
    {"r": 32, "alpha": 64, "k": 2, "hybrid_r": 0, "dropout": 0.0},
    NO_EXTRAS,
    renamed={"k": "gralora_k", "dropout": "gralora_dropout"},
    whole=("alpha",),
)

gralora = METHODS.register(
    Method(
        name="gralora",
        summary="the weight cut into k x k blocks, a low-rank change in each",
        paper="https://arxiv.org/abs/2505.20355",
        formula="W'_ij = W_ij + s B_ij A_ji for k x k blocks",
        config=GraLoRA,
        traits=Traits(additive=True, low_rank=True, layers=MATRICES),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(
            GraLoRA(r=2),
            GraLoRA(r=3, k=3, alpha=5),
            GraLoRA(r=4, k=2, alpha=5, hybrid_r=3, dropout=0.1),
            GraLoRA(r=3, k=1),
        ),
        peft=_KEYS.form(
            peft_type="GRALORA",
            suffixes={
                "gralora_A": "gralora_A",
                "gralora_B": "gralora_B",
                "gralora_A_general": "gralora_A_general.weight",
                "gralora_B_general": "gralora_B_general.weight",
            },
            layers=TRANSPOSED,
            peft_supports=lambda cfg, site: site.in_features % cfg.k == 0 == site.out_features % cfg.k,
            features=lambda params: (
                params["gralora_A"].shape[0] * params["gralora_A"].shape[1],
                params["gralora_B"].shape[0] * params["gralora_B"].shape[2],
            ),
        ),
    )
)
