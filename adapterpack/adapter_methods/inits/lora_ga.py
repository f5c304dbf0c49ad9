"""LoRA-GA: starts so that the first step follows the gradient of full fine-tuning (Wang et al. 2024, arXiv
2407.05000, algorithm 1).

    G = U S V^T;   B = k U[:, :r],  A = k V^T[r:2r],   k = out^(1/4) / sqrt(gamma)
"""

from __future__ import annotations

import numpy as np

from .. import Random, Site
from .base import INITS, Factors, Init, Options, pad
from .svd import top


def _make(r: int, scale: float, site: Site, options: Options, rng: Random) -> Factors:
    assert site.calibration is not None
    u, _, vt = top(np.asarray(site.calibration.gradient), 2 * r, options["iterations"], rng)
    half = min(r, len(vt) // 2) or 1  # a narrow layer has fewer than 2 r directions
    k = site.out_features**0.25 / np.sqrt(options["gamma"])
    A = vt[-half:] if len(vt) < 2 * r else vt[r : 2 * r]
    B = u[:, :half]
    return pad(((k * A).astype(np.float32), (k * B).astype(np.float32)), r)


lora_ga = INITS.register(
    Init(
        "lora_ga",
        "A and B are singular directions of the loss's gradient by the weight, on sample data",
        "https://arxiv.org/abs/2407.05000",
        _make,
        frozenset({"gradient"}),
        cancels=True,
        options={"gamma": 16.0, "iterations": 0},
    )
)
