"""Drops entries of single changes before they are merged: by size, at random, or both."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import ConfigError
from ...lowrank import magnitudes
from ...lowrank.quantiles import level
from ...lowrank.seeded_random import uniform
from .entries import EntryBlock, EntryBlocks

Levels = tuple[np.ndarray, np.ndarray]
"""The lower and upper magnitude of a band, ``[T]`` each."""


def largest_level(blocks: EntryBlocks, *, density: float, **_: Any) -> np.ndarray:
    """Returns ``[T]``: the magnitude of the smallest of the ``density`` largest entries of each change."""
    return _levels(blocks, blocks.each("density", density))


def _levels(blocks: EntryBlocks, shares: np.ndarray) -> np.ndarray:
    """Returns ``[T]``: the magnitude that a share ``[T]`` of the entries of each change reaches."""
    found = {
        share: level(lambda: (block.values for block in blocks()), share, blocks.sample)
        for share in dict.fromkeys(shares.tolist())
    }
    return np.array([found[share][index] for index, share in enumerate(shares.tolist())], np.float32)


def band_levels(blocks: EntryBlocks, *, density: float, gamma: float, **_: Any) -> Levels:
    """Returns ``[T]`` twice: the lower and upper magnitude (inclusive) of the band that holds ``density`` of
    the entries, just below the ``gamma`` largest.

    Raises:
        ConfigError: the two shares add up to more than 1.
    """
    kept, above = blocks.each("density", density), blocks.each("gamma", gamma)
    for share, most in zip(above.tolist(), (1 - kept).tolist(), strict=True):
        if share > most + 1e-12:
            raise ConfigError(
                "density and gamma are shares of the same entries",
                where="gamma",
                expected=f"at most {most:g}",
                found=share,
                remedy="lower one of them",
            )
    least = _levels(blocks, kept + above)
    return least, np.where(above == 0, np.float32(np.inf), _levels(blocks, above) if above.any() else least)


def trim(values: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Returns ``[T, ...]``: the entries whose magnitude, in float32, reaches ``least`` ``[T]``; all others
    are 0.
    """
    return np.where(
        magnitudes(values) < least.reshape(-1, *[1] * (values.ndim - 1)), values.dtype.type(0), values
    )


def band(block: EntryBlock, levels: Levels) -> np.ndarray:
    """Keeps the entries in the band and sets all others to 0; entries above its upper end are outliers."""
    sizes = magnitudes(block.values)
    return np.where((sizes >= levels[0][:, None, None]) & (sizes < levels[1][:, None, None]), block.values, 0)


def drop(block: EntryBlock, density: float, seed: int) -> np.ndarray:
    """Keeps each entry with probability ``density`` and divides it by that, which preserves the
    expectation.
    """
    kept = block.each("density", density)
    if (kept == 1).all():
        return block.values
    return np.where(_numbers(block, seed) < kept, block.values / kept.astype(block.values.dtype), 0)


def dropped_by_rank(block: EntryBlock, density: float, epsilon: float, seed: int) -> np.ndarray:
    """Keeps each entry with a probability that rises with its rank in its row from ``density - e`` to
    ``density + e``, and divides it by that probability.

    ``e`` is ``epsilon``, or ``1 - density`` where that is less. Entries of equal size share their mean rank,
    so a row of equal entries is dropped as in DARE.

    Raises:
        ConfigError: the window reaches 0.
    """
    middle = block.each("density", density)
    half = block.each("epsilon", epsilon)
    for least, most in zip(half.flat, middle.flat, strict=True):
        if least >= most:
            raise ConfigError(
                "epsilon is half the window of probabilities around density",
                where="epsilon",
                expected=f"below density {most:g}",
                found=float(least),
                remedy="lower it",
            )
    if (middle == 1).all():
        return block.values
    window = np.minimum(half, 1 - middle)
    n = block.values.shape[-1]
    kept = (
        middle + window * (2 * _ranks(magnitudes(block.values)) / max(1, n - 1) - 1)
        if n > 1
        else np.broadcast_to(middle, block.values.shape)
    )
    return np.where(_numbers(block, seed) < kept, block.values / kept.astype(block.values.dtype), 0)


def _ranks(sizes: np.ndarray) -> np.ndarray:
    """Returns the rank of every entry in its row, from 0; equal entries get their mean rank."""
    rows = sizes.reshape(-1, sizes.shape[-1])
    ranks = [
        np.searchsorted(ordered, row) + np.searchsorted(ordered, row, "right") - 1
        for row, ordered in zip(rows, np.sort(rows), strict=True)
    ]
    return np.reshape(ranks, sizes.shape) / 2


def _numbers(block: EntryBlock, seed: int) -> np.ndarray:
    return np.stack([uniform(seed, key, block.rows, block.values.shape[-1]) for key in block.keys])
