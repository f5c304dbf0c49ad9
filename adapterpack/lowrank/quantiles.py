"""Finds exact order statistics of the magnitudes of many numbers in few passes and little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

_MOST_KEPT = 1 << 24
"""The most numbers that are kept in memory to select from: 64 MB."""
_MOST_SAMPLED = 1 << 20
"""The most numbers of a row's sample that are looked at."""
_HALF = 1 << 16
"""How many lower halves, and upper ones, the bits of a float32 have."""


def magnitudes(values: np.ndarray) -> np.ndarray:
    """``|x|`` in float32, in which magnitudes are ranked."""
    absolute: np.ndarray = np.abs(values).astype(np.float32, copy=False)
    return absolute


def level(
    values: Callable[[], Iterator[np.ndarray]],
    share: float,
    sample: Callable[[], np.ndarray | None] = lambda: None,
) -> np.ndarray:
    """``[C]``: of each of ``C`` rows of numbers, the magnitude that a ``share`` of them reaches or exceeds,
    exactly.

    ``values`` gives pieces ``[C, ...]``, the same ones each time, and ``sample`` some of the numbers, ``[C,
    S]``; magnitudes are those of float32. One pass counts the magnitudes above what the sample expects and
    keeps those near it, among which the level is unless the sample misled. Otherwise the bit patterns are
    counted, which have the order of the magnitudes: the upper halves in one pass, in a second one the lower
    halves inside the bin that was found. So memory is bounded, whatever the size.

    Example:
        >>> piece = np.arange(10, dtype=np.float32)[None]
        >>> level(lambda: iter([piece[:, :4], -piece[:, 4:]]), 0.3)
        array([7.], dtype=float32)
    """
    numbers = sample()
    if numbers is not None and numbers.size:
        every = -(-numbers.shape[1] // _MOST_SAMPLED)
        near = _select_near(values, share, magnitudes(numbers[:, ::every]))
        if near is not None:
            return near
    return _select_by_bits(values, share)


def _place(share: float, count: int) -> int:
    """Which of ``count`` magnitudes the level is, from 1 for the largest."""
    return min(count, max(1, round(share * count)))


def _select_near(
    values: Callable[[], Iterator[np.ndarray]], share: float, sample: np.ndarray
) -> np.ndarray | None:
    """:func:`level`, if it is where the sample expects it and few magnitudes are there."""
    ordered, count = np.sort(sample, axis=1)[:, ::-1], sample.shape[1]
    spread = 0.005 * count + 2 * np.sqrt(count)
    first, last = round(share * count - spread), round(share * count + spread)
    low = ordered[:, last] if last < count else np.zeros(len(sample), np.float32)
    high = ordered[:, first] if first >= 0 else np.full(len(sample), np.inf, np.float32)
    near: list[list[np.ndarray]] = [[] for _ in sample]
    above, size = np.zeros(len(sample), np.int64), 0
    for piece in values():
        rows = _rows(piece)
        size += rows.shape[1]
        for number, row in enumerate(rows):
            higher = row >= high[number]
            above[number] += np.count_nonzero(higher)
            near[number].append(row[(row >= low[number]) ^ higher])
        if sum(len(part) for parts in near for part in parts) > _MOST_KEPT:
            return None
    places = _place(share, size) - above
    kept = [np.concatenate(parts) for parts in near]
    if not all(1 <= place <= len(row) for place, row in zip(places, kept, strict=True)):
        return None
    return np.array(
        [
            np.partition(row, len(row) - place)[len(row) - place]
            for place, row in zip(places, kept, strict=True)
        ],
        np.float32,
    )


def _select_by_bits(values: Callable[[], Iterator[np.ndarray]], share: float) -> np.ndarray:
    """:func:`level` by counting bit patterns."""
    upper: list[np.ndarray] = []
    for piece in values():
        counts = [np.bincount(_bits(row) >> 16, minlength=_HALF) for row in _rows(piece)]
        upper = [one + more for one, more in zip(upper, counts, strict=True)] if upper else counts
    bins = [_reach(counts, _place(share, int(counts.sum()))) for counts in upper]
    lower = [np.zeros(_HALF, np.int64) for _ in bins]
    for piece in values():
        for number, row in enumerate(_rows(piece)):
            bits = _bits(row)
            lower[number] += np.bincount(bits[bits >> 16 == bins[number][0]] & 0xFFFF, minlength=_HALF)
    found = [half << 16 | _reach(counts, place)[0] for (half, place), counts in zip(bins, lower, strict=True)]
    return np.array(found, np.uint32).view(np.float32)


def _reach(counts: np.ndarray, place: int) -> tuple[int, int]:
    """The bin in which the ``counts``, summed from the last one down, reach ``place``, and the place inside
    it.

    Example:
        >>> _reach(np.array([4, 3, 0, 2]), 3)
        (1, 1)
    """
    sums = np.cumsum(counts[::-1])
    number = int(np.searchsorted(sums, place))
    bin_of_place = len(counts) - 1 - number
    return bin_of_place, place - int(sums[number] - counts[bin_of_place])


def _rows(piece: np.ndarray) -> np.ndarray:
    """The magnitudes ``[C, N]``."""
    return magnitudes(piece).reshape(len(piece), -1)


def _bits(row: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(row).view(np.uint32)
