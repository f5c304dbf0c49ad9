"""The inits that need no data about a site: default, gaussian, zeros, orthogonal."""

from __future__ import annotations

import numpy as np

from .. import Random, Site, kaiming, normal, takes_ids
from .base import INITS, Factors, Init, Options


def _default(r: int, scale: float, site: Site, options: Options, rng: Random) -> Factors:
    # for a one-hot input a row of A yields one entry, and 1 / sqrt(vocabulary) is too small to learn from
    if takes_ids(site.kind):
        return _zeros(r, scale, site, options, rng)
    return kaiming(rng, (r, site.in_features)), np.zeros((site.out_features, r), np.float32)


def _gaussian(r: int, scale: float, site: Site, options: Options, rng: Random) -> Factors:
    A = normal(rng, (r, site.in_features), 1 / r)  # the standard deviation in PEFT and diffusers
    return A, np.zeros((site.out_features, r), np.float32)


def _zeros(r: int, scale: float, site: Site, options: Options, rng: Random) -> Factors:
    return np.zeros((r, site.in_features), np.float32), kaiming(rng, (site.out_features, r))


def _orthogonal(r: int, scale: float, site: Site, options: Options, rng: Random) -> Factors:
    if r % 2:
        raise ValueError(f"the orthogonal init needs an even rank, not {r}")
    # A and B use disjoint rows of one orthogonal matrix, so that B A is zero.
    Q = np.linalg.qr(rng.normal(size=(r, r)))[0]
    A = Q[0::2].T @ rng.normal(size=(r // 2, site.in_features)) / 10
    B = rng.normal(size=(site.out_features, r // 2)) @ Q[1::2] / 10
    return A.astype(np.float32), B.astype(np.float32)


default = INITS.register(
    Init("default", "A Kaiming-uniform, B zero", "https://arxiv.org/abs/2106.09685", _default)
)
gaussian = INITS.register(
    Init("gaussian", "A normal with deviation 1/r, B zero", "https://arxiv.org/abs/2106.09685", _gaussian)
)
zeros = INITS.register(
    Init(
        "zeros",
        "A zero, B uniform: the change begins on the output side",
        "https://arxiv.org/abs/2406.08447",
        _zeros,
    )
)
orthogonal = INITS.register(
    Init(
        "orthogonal",
        "A and B random and orthogonal to each other: B A is zero but for rounding",
        "https://datta0.github.io/posts/rethink-lora-init/",
        _orthogonal,
        cancels=True,
    )
)
