"""MoRA: one square matrix in place of LoRA's two, for a change of high rank (Jiang et al. 2024, arXiv
2405.12130, section 4).

    y' = base(x) + widen(M narrow(x))

M is ``[n, n]`` with about as many numbers as a LoRA of rank r: ``n = round(sqrt(r (in + out)))``. The input
is repeated until n divides its length, and divided into blocks of n. ``sharing`` sums the blocks (equation
6); ``rope`` rotates block b by b times the angles of rotary embeddings and passes each block through M, with
concatenated results (equation 9; n must be even). The result is repeated or cut off to the length of the
output. There is no scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from . import (
    METHODS,
    Array,
    Arrays,
    BlockDiagonal,
    BlockSums,
    Chain,
    Dense,
    Method,
    NormalForm,
    Params,
    RankConfig,
    Repeat,
    Shapes,
    Site,
    Storage,
    Traits,
    array_namespace,
    zeros,
)


@dataclass(frozen=True)
class MoRA(RankConfig):
    """The hyper-parameters of MoRA: ``r`` is the rank of the LoRA of the same size; ``form`` is ``rope`` or
    ``sharing``.

    Example:
        >>> MoRA(r=8).form
        'rope'
    """

    form: Literal["rope", "sharing"] = "rope"


def _side(cfg: MoRA, site: Site) -> int:
    n = int(math.sqrt(cfg.r * (site.in_features + site.out_features)) + 0.5)
    return max(2, n // 2 * 2) if cfg.form == "rope" else n


def _shapes(cfg: MoRA, site: Site) -> Shapes:
    return {"mora_M": (_side(cfg, site), _side(cfg, site))}


def _constants(cfg: MoRA, site: Site) -> Arrays:
    n = _side(cfg, site)
    if cfg.form == "sharing":
        return {}
    cos, sin = _angles(n, -(-site.in_features // n))
    return {"cos": cos, "sin": sin}


@lru_cache(maxsize=64)
def _angles(n: int, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns cosines and sines ``[blocks, n]`` of the rotary angles; the second half repeats the first."""
    angles = np.tile(np.outer(np.arange(blocks), 10000.0 ** (-np.arange(0, n, 2) / n)), (1, 2))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _expanded_size(cfg: MoRA, site: Site) -> int:
    """Returns the size of one rotated matrix per block of the input."""
    n = max(_side(cfg, site), 1)
    return -(-site.in_features // n) * n * n


def _normal_form(cfg: MoRA, params: Params, site: Site) -> NormalForm:
    M = params["mora_M"]
    n = M.shape[0]
    out = site.out_features
    wide = -(-site.in_features // n) * n
    # Repeats the input until n divides its length.
    blocks = Repeat(site.in_features, wide, M)
    if cfg.form == "sharing":
        return NormalForm(down=Chain(Chain(blocks, BlockSums(wide, n, M)), Dense(M)), up=Repeat(n, out, M))
    # Rotating M's columns instead of every input folds the rotation into a constant matrix.
    turned = BlockDiagonal(_rotate(M, params["cos"], params["sin"]))
    return NormalForm(down=Chain(blocks, turned), up=Repeat(wide, out, M))


def _rotate(M: Array, cos: Array, sin: Array) -> Array:
    """Returns ``M R_b`` for every block b: ``[blocks, n, n]``, where ``R_b x = cos_b x + sin_b (-x[h:],
    x[:h])``.
    """
    xp = array_namespace(M, cos, sin)
    half = M.shape[1] // 2
    crossed = xp.concat([M[:, half:], -M[:, :half]], axis=1)
    return M[None] * cos[:, None, :] + crossed[None] * sin[:, None, :]


mora = METHODS.register(
    Method(
        name="mora",
        summary="one square matrix in place of LoRA's two: a change of high rank",
        paper="https://arxiv.org/abs/2405.12130",
        formula="y' = W x + b + widen(M narrow(x)),  M square",
        config=MoRA,
        traits=Traits(additive=True),
        shapes=_shapes,
        init=zeros(_shapes),
        normal_form=_normal_form,
        examples=(MoRA(r=1), MoRA(r=3), MoRA(r=1, form="sharing"), MoRA(r=2, form="sharing", dropout=0.1)),
        storage=Storage(constants=_constants, expanded_size=_expanded_size),
    )
)
