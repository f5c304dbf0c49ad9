"""Passes over dense entries: TIES' vote, and the counts that an order statistic is read off.

A compiled kernel does them where it was built (see :mod:`.build`), and reads a number once; numpy does them
elsewhere, in twenty passes for a vote. Both give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .loading import load

_kernel = load("_passes")

UPPER, LOWER = 1 << 15, 1 << 16
"""How many upper halves the bits of a float32 magnitude may have, and how many lower ones."""
_TIE = 1e-6
"""Of the votes cast: a majority that is rounding in float32 is none."""


def compiled() -> bool:
    """Whether the kernel is there: reading values twice is then cheaper than keeping them."""
    return _kernel is not None


def trimmed(values: np.ndarray, least: np.ndarray) -> np.ndarray:
    """``[T, ...]``: the entries whose magnitude, in float32, reaches ``least`` ``[T]``; all others 0."""
    sizes = np.abs(values).astype(np.float32, copy=False)
    return np.where(sizes < least.reshape(-1, *[1] * (values.ndim - 1)), values.dtype.type(0), values)


def elected(
    values: np.ndarray, weights: np.ndarray, normalize: bool, least: np.ndarray | None = None
) -> np.ndarray:
    """TIES: at each entry the sign of ``sum w_t x_t`` is elected, and the ``w_t x_t`` of that sign are added
    up.

    ``values`` are ``[T, ...]``; with ``least`` ``[T]`` they are :func:`trimmed` first. Where the votes are
    even nothing is elected. ``normalize`` divides by the sum of the ``|w_t|`` that were added: a mean that is
    never larger than its largest part.

    Example:
        >>> values = np.array([[3.0, 1.0, -1.0], [1.0, -1.0, -0.5]], np.float32)
        >>> elected(values, np.ones(2), True), elected(values, np.ones(2), True, np.array([0.0, 2.0],
        ...     np.float32))
        (array([ 2.  ,  0.  , -0.75], dtype=float32), array([ 3.,  1., -1.], dtype=float32))
    """
    if _kernel is None or values.dtype != np.float32:
        return _elected(values if least is None else trimmed(values, least), weights, normalize)
    merged = np.empty(values.shape[1:], np.float32)
    floor = np.zeros(len(values), np.float32) if least is None else np.ascontiguousarray(least, np.float32)
    _kernel.elect(np.ascontiguousarray(values), floor, weights.astype(np.float32), _TIE, normalize, merged)
    return merged


def _elected(values: np.ndarray, weights: np.ndarray, normalize: bool) -> np.ndarray:
    shape, dtype = values.shape[1:], values.dtype
    weights = weights.astype(dtype)
    up, lead, scratch = np.zeros(shape, dtype), np.zeros(shape, dtype), np.empty(shape, dtype)
    voters = (
        {size: np.zeros((2, *shape), np.uint8) for size in np.unique(np.abs(weights)).tolist()}
        if normalize
        else {}
    )
    for weight, value in zip(weights.tolist(), values, strict=True):
        part = value if weight == 1 else np.multiply(value, dtype.type(weight))
        up += np.maximum(part, 0, out=scratch)
        lead += part
        if normalize:
            for count, voted in zip(voters[abs(weight)], (part > 0, part < 0), strict=True):
                np.add(count, voted.view(np.uint8), out=count)  # the same bytes: no pass to convert them
    won = lead > 0
    # minus what was below 0, in the order of the sums: exactly 0 where nothing was
    lost = np.subtract(lead, up, out=scratch)
    merged = np.where(won, up, lost)
    if normalize:
        merged /= _counted(voters, won, dtype)
    votes = np.subtract(up, lost, out=scratch)
    decided = np.greater(np.abs(lead, out=lead), np.multiply(votes, dtype.type(_TIE), out=votes))
    return np.where(decided, merged, dtype.type(0))


def _counted(voters: Mapping[float, np.ndarray], won: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """The sum of the sizes of the weights that voted with the sign that won; never 0: where nobody voted 0 is
    divided.
    """
    counted = np.zeros(won.shape, dtype)
    for size, count in voters.items():
        votes = np.where(won, *count).astype(dtype)
        counted += votes if size == 1 else np.multiply(votes, dtype.type(size), out=votes)
    nonzero: np.ndarray = np.maximum(counted, np.finfo(dtype).tiny, out=counted)
    return nonzero


def count_upper(values: np.ndarray, counts: np.ndarray) -> None:
    """Adds to ``counts`` ``[UPPER]`` (int64) how many of the float32 ``values``, C-contiguous, have which
    upper half without the sign.

    Magnitudes are in the order of their bits.
    """
    if _kernel is None:
        counts += np.bincount(_bits(values) >> 16, minlength=UPPER)
    else:
        _kernel.upper(values, counts)


def count_lower(values: np.ndarray, upper: int, counts: np.ndarray) -> None:
    """Adds to ``counts`` ``[LOWER]`` (int64) the lower halves of those of the ``values`` whose upper half is
    ``upper``.
    """
    if _kernel is None:
        bits = _bits(values)
        counts += np.bincount(bits[bits >> 16 == upper] & 0xFFFF, minlength=LOWER)
    else:
        _kernel.lower(values, upper, counts)


def reached(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """The bin in which the ``counts``, summed from the last one down, reach ``wanted``, and the sum of the
    bins above it.

    Example:
        >>> reached(np.array([4, 3, 0, 2]), 3)
        (1, 2)
    """
    if _kernel is not None:
        bin_and_above: tuple[int, int] = _kernel.reached(counts, wanted)
        return bin_and_above
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, wanted))
    return len(counts) - 1 - place, int(above[place] - counts[len(counts) - 1 - place])


class Between:
    """Of float32 numbers that come in pieces: how many magnitudes have bits of at least ``high``, and those
    from ``low`` on below it.

    Only where the kernel is :func:`compiled`.
    """

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high, self.above, self.count = low, high, 0, 0
        self._kept = np.empty(0, np.float32)

    def add(self, values: np.ndarray) -> None:
        """One piece, C-contiguous."""
        assert _kernel is not None
        # room for all of it, most of which is left for the next pieces
        if len(self._kept) < self.count + values.size:
            before, self._kept = (
                self._kept[: self.count],
                np.empty(2 * (self.count + values.size), np.float32),
            )
            self._kept[: self.count] = before
        above, self.count = _kernel.between(values, self.low, self.high, self._kept, self.count)
        self.above += above

    def largest(self, place: int) -> np.float32:
        """The magnitude in that place among those in between, from 1 for the largest."""
        magnitude: np.float32 = np.partition(self._kept[: self.count], self.count - place)[self.count - place]
        return magnitude


def _bits(values: np.ndarray) -> np.ndarray:
    return (values.reshape(-1).view(np.uint32) & 0x7FFFFFFF).astype(np.int64)
