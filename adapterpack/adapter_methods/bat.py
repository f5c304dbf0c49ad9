"""Bat: the variant of MiSS (Bone) that multiplies each block of the weight by a trained matrix (Kang et al.
2024, arXiv 2409.15371).

    W'[i, j] = W[i, j] + W[i, j] M[i] + M[i]

W is divided into r x r blocks, i of outputs and j of inputs; M is ``[out/r, r, r]``. If r does not divide the
number of columns, they are padded with zeros and cut off again. If r does not divide the number of outputs,
the largest divisor of r that does replaces it (PEFT refuses both cases).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from . import (
    MATRICES,
    METHODS,
    Array,
    Dense,
    Method,
    NormalForm,
    Params,
    RankConfig,
    Shapes,
    Site,
    Traits,
    array_namespace,
    zeros,
)
from .miss import is_miss, miss_keys


@dataclass(frozen=True)
class Bat(RankConfig):
    """The hyper-parameters of Bat: ``r`` is the size of a block.

    Example:
        >>> Bat(r=64).scale
        1.0
    """


def _shapes(cfg: Bat, site: Site) -> Shapes:
    r = math.gcd(cfg.r, site.out_features)
    return {"miss_block": (site.out_features // r, r, r)}


def _normal_form(cfg: Bat, params: Params, site: Site) -> NormalForm:
    M = params["miss_block"]
    weight: Array = site.weight
    xp = array_namespace(M, weight)
    count, r, _ = M.shape
    out, width = weight.shape
    wide = -(-width // r)
    if wide * r > width:
        weight = xp.concat(
            [weight, xp.zeros((out, wide * r - width), dtype=weight.dtype, device=weight.device)], axis=1
        )
    # All blocks of a block row are multiplied by the same M[i], so one batched product covers them.
    blocks = xp.reshape(weight, (count, r * wide, r))  # all blocks of one i, one below the other
    turned = xp.reshape(xp.matmul(blocks, M), (count, r, wide, r)) + M[:, :, None, :]
    return NormalForm(down=Dense(xp.reshape(turned, (out, wide * r))[:, :width]))


bat = METHODS.register(
    Method(
        name="bat",
        summary="MiSS that turns each block of the weight by a trained one",
        paper="https://arxiv.org/abs/2409.15371",
        formula="W'_ij = W_ij + W_ij M_i + M_i for r x r blocks",
        config=Bat,
        traits=Traits(reads_weight=True, layers=MATRICES),
        shapes=_shapes,
        init=zeros(_shapes),
        normal_form=_normal_form,
        examples=(Bat(r=1), Bat(r=4), Bat(r=5)),
        peft=miss_keys(Bat, init_weights="bat").form(
            peft_type="MISS",
            suffixes=("miss_block",),
            features=lambda params: (None, params["miss_block"].shape[0] * params["miss_block"].shape[1]),
            matches=lambda config: is_miss(config, "bat"),
            aliases={"bone_block": "miss_block"},
        ),
    )
)
