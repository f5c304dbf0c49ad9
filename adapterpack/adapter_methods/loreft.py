"""LoReFT: changes the hidden state within a subspace of few dimensions (Wu et al. 2024, arXiv 2404.03592,
equation 2).

    h' = h + R^T (W h + b - R h),   R [r, width] with orthonormal rows

W is stored as its difference from R, ``source`` = W - R, which starts at zero: a fresh adapter changes
nothing, exactly, and training can reach every W. R is computed from a free matrix V by ``R = L^-1 V`` with
the Cholesky factor ``L L^T = V V^T``. These are the Gram-Schmidt rows of V, which are unique, so every
library computes the same R. ``orthogonal=False`` uses V itself: DiReFT (section 3.2) and NoReFT, which have
the same form here.

``positions`` selects a prompt's first and last positions (section 4, :mod:`~.core.token_positions`). Padding
does not count; in a training row the prompt is everything before the first label; generated tokens are left
alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from . import (
    FOR_TRAINING,
    METHODS,
    Array,
    Arrays,
    BlockForm,
    Dense,
    Method,
    Params,
    PositiveInt,
    Random,
    Shapes,
    Site,
    SiteConfig,
    array_namespace,
    zeros,
)
from .core.token_positions import Ends, ends_of
from .forms.blocks import TRAITS


@dataclass(frozen=True, kw_only=True)
class LoReFT(SiteConfig):
    """The hyper-parameters of LoReFT; ``targets`` as in :class:`~.forms.blocks.BlockConfig`. A site narrower
    than r has its width.

    ``positions``: ``all``, or how many of a prompt's first and last: ``f3``, ``l1``, ``f3+l1``.

    Example:
        >>> LoReFT(r=8, positions="f1+l1").acts
        Ends(first=1, last=1)
    """

    targets: str | tuple[str, ...] = field(default="all-layers", metadata=FOR_TRAINING)
    r: PositiveInt = 4
    orthogonal: bool = True
    positions: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        ends_of(self.positions)

    @property
    def acts(self) -> Ends | None:
        """Acts on the first and last positions of a prompt, or on all positions (None)."""
        return ends_of(self.positions)

    @property
    def rank(self) -> int:
        """The number of dimensions of the subspace."""
        return self.r


def _shapes(cfg: LoReFT, site: Site) -> Shapes:
    r = min(cfg.r, site.out_features)
    n = site.out_features
    return {"rotation": (r, n), "source": (r, n), "bias": (r,)}


def _init(cfg: LoReFT, site: Site, rng: Random) -> Arrays:
    V = rng.normal(size=_shapes(cfg, site)["rotation"])
    rotation = orthonormal(V) if cfg.orthogonal else V / math.sqrt(site.out_features)
    return {**zeros(_shapes)(cfg, site, rng), "rotation": rotation.astype(np.float32)}


def orthonormal(V: Array) -> Array:
    """Returns the Gram-Schmidt rows of ``V`` ``[r, n]``, with r at most n; computed in at least float32.

    Example:
        >>> R = orthonormal(np.array([[2.0, 0.0], [1.0, 3.0]]))
        >>> np.allclose(R, np.eye(2))
        True
    """
    xp = array_namespace(V)
    wide = V if V.dtype == xp.float64 else xp.astype(V, xp.float32)
    return xp.astype(xp.linalg.solve(xp.linalg.cholesky(xp.matmul(wide, wide.T)), wide), V.dtype)


def _normal_form(cfg: LoReFT, params: Params, site: Site) -> BlockForm:
    R = orthonormal(params["rotation"]) if cfg.orthogonal else params["rotation"]
    return BlockForm(down=Dense(params["source"]), up=Dense(R.T), down_bias=params["bias"])


loreft = METHODS.register(
    Method(
        name="loreft",
        summary="a change of hidden states within a learned subspace; DiReFT by orthogonal=False",
        paper="https://arxiv.org/abs/2404.03592",
        formula="h + R^T (W h + b - R h), R R^T = I",
        kind="activation",
        config=LoReFT,
        traits=TRAITS,
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(
            LoReFT(r=1),
            LoReFT(r=3),
            LoReFT(r=2, orthogonal=False),
            LoReFT(r=5, dropout=0.1),
            LoReFT(r=3, positions="f2+l1"),
            LoReFT(r=2, positions="l2"),
        ),
    )
)
