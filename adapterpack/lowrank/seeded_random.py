"""Random numbers that depend only on the seed and on their position in a named matrix, not on threads,
blocks, order or shards.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

STEP = np.uint64(0x9E3779B97F4A7C15)
"""By how much SplitMix64's state grows from one number to the next."""


def uniform(seed: int, key: str, rows: slice, columns: int) -> np.ndarray:
    """Returns the random numbers in [0, 1) for these rows of the matrix called ``key``: ``[rows, columns]``,
    float64.

    Number ``i`` is the ``i``-th output of SplitMix64, started from a hash of seed and key. Source: Steele,
    Lea and Flood 2014, Fast splittable pseudorandom number generators, figure 17.

    Example:
        >>> whole = uniform(0, "pack:layer", slice(0, 4), 3)
        >>> np.array_equal(whole[1:3], uniform(0, "pack:layer", slice(1, 3), 3))
        True
    """
    start = int.from_bytes(blake2b(f"{seed}:{key}".encode(), digest_size=8).digest(), "little")
    index = np.arange(rows.start * columns + 1, rows.stop * columns + 1, dtype=np.uint64).reshape(-1, columns)
    numbers: np.ndarray = (mix(index * STEP + np.uint64(start)) >> np.uint64(11)) * 2.0**-53
    return numbers


def mix(states: np.ndarray) -> np.ndarray:
    """Returns SplitMix64's output for each of its states, ``[n]`` uint64; products wrap modulo 2^64."""
    mixed = (states ^ (states >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    output: np.ndarray = mixed ^ (mixed >> np.uint64(31))
    return output
