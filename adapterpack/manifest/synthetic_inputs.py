"""Generates inputs from a recipe: pseudo-random images and speech features from a seed and a shape, bit for
bit the same on every machine.
"""

from __future__ import annotations

import numpy as np

from ..lowrank.seeded_random import STEP, mix
from .structs import Recipe


def make_row(recipe: Recipe, row: int) -> np.ndarray:
    """Returns one row of a recipe, ``[1, *shape of a row]`` float32, uniform in [-1, 1), roughly as
    normalised pixels and log-mel features are.

    Number i of all rows is mix(seed * 2^32 + i), of which the upper 24 bits are used, so that float32
    represents it exactly. The generator is SplitMix64 (Steele, Lea and Flood 2014, Fast splittable
    pseudorandom number generators, figure 16), restarted for every number: each number can be computed
    without those before it, by unsigned 64-bit arithmetic alone.

    Example:
        >>> from adapterpack.manifest.structs import Pixels
        >>> make_row(Pixels(7, (2, 1, 1, 3)), 1).ravel()
        array([-0.12730932,  0.3798833 ,  0.7858412 ], dtype=float32)
    """
    _, *shape = recipe.shape
    size = int(np.prod(shape, dtype=np.int64))
    counters = np.arange(row * size, (row + 1) * size, dtype=np.uint64) + (
        np.uint64(recipe.seed) << np.uint64(32)
    )
    kept = (mix((counters + np.uint64(1)) * STEP) >> np.uint64(40)).astype(np.float32)
    return (kept * np.float32(2.0**-23) - np.float32(1)).reshape(1, *shape)
