"""MiCA: fixes B at the weight's smallest left singular directions and trains A only (arXiv 2604.01694)."""

from __future__ import annotations

import numpy as np

from .. import Random, Site
from .base import INITS, Factors, Init, Options, pad


def _make(r: int, scale: float, site: Site, options: Options, rng: Random) -> Factors:
    u = np.linalg.svd(np.asarray(site.weight, np.float64), full_matrices=False)[0][:, -r:]
    return pad((np.zeros((u.shape[1], site.in_features), np.float32), u.astype(np.float32)), r)


mica = INITS.register(
    Init(
        "mica",
        "B is fixed at the weight's r smallest left singular directions; A begins at zero",
        "https://arxiv.org/abs/2604.01694",
        _make,
        frozenset({"weight"}),
        frozen=frozenset({"lora_B"}),
    )
)
