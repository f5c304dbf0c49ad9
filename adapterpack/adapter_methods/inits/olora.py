"""OLoRA: starts from the first r columns of Q and rows of R in W = Q R (Büyükakyüz 2024, arXiv 2406.01775,
section 3).
"""

from __future__ import annotations

import numpy as np

from .. import Random, Site
from .base import INITS, Factors, Init, Options, pad


def _make(r: int, scale: float, site: Site, options: Options, rng: Random) -> Factors:
    Q, R = np.linalg.qr(np.asarray(site.weight, np.float64))
    return pad((R[:r].astype(np.float32), Q[:, :r].astype(np.float32)), r)


olora = INITS.register(
    Init(
        "olora",
        "B is orthonormal: the first columns of Q, A the first rows of R, of the weight's QR decomposition",
        "https://arxiv.org/abs/2406.01775",
        _make,
        frozenset({"weight"}),
        cancels=True,
    )
)
