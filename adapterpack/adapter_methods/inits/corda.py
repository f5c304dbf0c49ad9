"""CorDA: starts from the singular directions of the weight, weighted by the covariance of the inputs.

    W C = U S V^T,  C = E[x x^T];   B = U sqrt(S),  A = sqrt(S) V^T C^-1
    B A is the part of W in those directions

The instruction-previewed mode (``ipm``) uses the largest directions, the knowledge-preserved mode (``kpm``)
the smallest. Source: Yang et al. 2024, arXiv 2406.05223, section 3.
"""

from __future__ import annotations

import numpy as np

from .. import Random, Site
from .base import INITS, Factors, Init, Options, pad, split


def _make(r: int, scale: float, site: Site, options: Options, rng: Random) -> Factors:
    if options["mode"] not in {"ipm", "kpm"}:
        raise ValueError(f"the mode of CorDA must be ipm or kpm, not {options['mode']!r}")
    moment = np.asarray(site.calibration.moment, np.float64)  # type: ignore[union-attr]
    # with few sample rows the moment is singular
    damped = moment + 0.01 * np.trace(moment) / len(moment) * np.eye(len(moment))
    u, s, vt = np.linalg.svd(np.asarray(site.weight, np.float64) @ damped, full_matrices=False)
    chosen = slice(0, r) if options["mode"] == "ipm" else slice(max(0, len(s) - r), len(s))
    u = u[:, chosen]
    s = s[chosen]
    vt = vt[chosen]
    return pad(split(u, s, np.linalg.solve(damped, vt.T).T, scale), r)


corda = INITS.register(
    Init(
        "corda",
        "A and B are singular directions of the weight seen through the inputs' covariance; mode ipm or kpm",
        "https://arxiv.org/abs/2406.05223",
        _make,
        frozenset({"weight", "moment"}),
        cancels=True,
        options={"mode": "ipm"},
    )
)
