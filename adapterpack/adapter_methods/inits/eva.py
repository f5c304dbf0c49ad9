"""EVA: starts from the principal directions of a layer's inputs, with more rank where they explain more
variance (Paischer et al. 2024, arXiv 2410.07170).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .. import Random, Site
from .base import INITS, Factors, Init, Options, pad


def _directions(site: Site) -> tuple[np.ndarray, np.ndarray]:
    """Returns the variances of a site's inputs, in descending order, and their directions as the rows of
    ``[in, in]``.
    """
    assert site.calibration is not None
    values, vectors = np.linalg.eigh(np.asarray(site.calibration.moment, np.float64))
    return np.maximum(values[::-1], 0), vectors[:, ::-1].T


def _make(r: int, scale: float, site: Site, options: Options, rng: Random) -> Factors:
    A = _directions(site)[1][:r]
    return pad((A.astype(np.float32), np.zeros((site.out_features, len(A)), np.float32)), r)


def _ranks(ranks: Mapping[str, int], sites: Sequence[Site], options: Options) -> Mapping[str, int]:
    """Redistributes the ranks, with the same sum, to the components that explain most of their layer's
    variance; each site gets at least 1 and at most ``rho`` times its rank.
    """
    if options["rho"] <= 1:
        return ranks
    shares = []
    for site in sites:
        variances = _directions(site)[0]
        room = min(int(ranks[site.path] * options["rho"]), len(variances), site.out_features)
        shares += [
            # Each site already has its first component.
            (float(v / variances.sum()) if variances.sum() else 0.0, site.path)
            for v in variances[1:room]
        ]
    assigned = {site.path: 1 for site in sites}
    for _, path in sorted(shares, key=lambda share: -share[0])[: max(0, sum(ranks.values()) - len(sites))]:
        assigned[path] += 1
    return assigned


eva = INITS.register(
    Init(
        "eva",
        "A is the r principal directions of the layer's inputs on sample data, B zero; rho > 1 shares ranks "
        "out by variance",
        "https://arxiv.org/abs/2410.07170",
        _make,
        frozenset({"moment"}),
        options={"rho": 2.0},
        ranks=_ranks,
    )
)
