"""LoftQ: starts from the low-rank part of what 4-bit quantization of the weight would lose (Li et al. 2023,
arXiv 2310.08659, algorithm 1).

The base is not changed, even if it is quantized: the start is subtracted again, as with every init. LoftQ
therefore contributes directions here, not a correction of a base that is already quantized.
"""

from __future__ import annotations

import numpy as np

from .. import Random, Site
from .base import INITS, Factors, Init, Options, pad, split
from .svd import top

NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
"""The sixteen values of NormalFloat4 (Dettmers et al. 2023, arXiv 2305.14314, appendix E)."""
_BLOCK = 64


def nf4(matrix: np.ndarray) -> np.ndarray:
    """Rounds a matrix to NormalFloat4 in blocks of 64 values, each scaled by its largest magnitude; float64
    of the same shape.

    Example:
        >>> nf4(np.array([[2.0, 0.1, -2.0]])).round(3).tolist()
        [[2.0, 0.159, -2.0]]
    """
    flat = matrix.astype(np.float64).ravel()
    blocks = np.pad(flat, (0, -len(flat) % _BLOCK)).reshape(-1, _BLOCK)
    scales = np.abs(blocks).max(axis=1, keepdims=True)
    unit = blocks / np.where(scales == 0, 1, scales)
    middles = (NF4[1:] + NF4[:-1]) / 2
    rounded: np.ndarray = (
        (NF4[np.searchsorted(middles, unit)] * scales).ravel()[: len(flat)].reshape(matrix.shape)
    )
    return rounded


def _make(r: int, scale: float, site: Site, options: Options, rng: Random) -> Factors:
    weight = np.asarray(site.weight, np.float64)
    # Alternates between quantizing the rest and factoring the quantization error, as in algorithm 1.
    change = np.zeros_like(weight)
    for _ in range(max(1, options["iterations"])):
        u, s, vt = top(weight - nf4(weight - change), r, 0, rng)
        change = (u * s) @ vt
    return pad(split(u, s, vt, scale), r)


loftq = INITS.register(
    Init(
        "loftq",
        "A and B are the low-rank part of what NormalFloat4 loses of the weight",
        "https://arxiv.org/abs/2310.08659",
        _make,
        frozenset({"weight"}),
        cancels=True,
        options={"iterations": 1},
    )
)
