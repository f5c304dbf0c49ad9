"""PiSSA: starts from the largest singular directions of the weight (Meng et al. 2024, arXiv 2404.02948,
section 3).
"""

from __future__ import annotations

from .. import Random, Site
from .base import INITS, Factors, Init, Options, pad, split
from .svd import top


def _make(r: int, scale: float, site: Site, options: Options, rng: Random) -> Factors:
    u, s, vt = top(site.weight, r, options["iterations"], rng)  # type: ignore[arg-type]
    return pad(split(u, s, vt, scale), r)


pissa = INITS.register(
    Init(
        "pissa",
        (
            "A and B are the weight's r largest singular directions; iterations > 0 finds them by random "
            "projection"
        ),
        "https://arxiv.org/abs/2404.02948",
        _make,
        frozenset({"weight"}),
        cancels=True,
        options={"iterations": 0},
    )
)
