"""Finds exact order statistics of the magnitudes of very many numbers in few passes and bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

Numbers = Callable[[], Iterator[np.ndarray]]
"""What a pass reads: pieces ``[C, ...]``, the same at every call."""
_MOST_KEPT = 1 << 24
"""The most numbers kept in memory for the selection: 64 MB."""
_MOST_SAMPLED = 1 << 20
"""The most numbers of a row's sample that are used."""
_HALF = 1 << 16
"""The number of values that 16 bits, one half of a float32, can have."""


def magnitudes(values: np.ndarray) -> np.ndarray:
    """Returns ``|x|`` in float32, the dtype in which magnitudes are ranked."""
    absolute: np.ndarray = np.abs(values).astype(np.float32, copy=False)
    return absolute


def level(
    values: Numbers,
    share: float,
    sample: Callable[[], np.ndarray | None] = lambda: None,
) -> np.ndarray:
    """Returns, for each of ``C`` rows of numbers, exactly the magnitude that a ``share`` of them reaches or
    exceeds: ``[C]``.

    ``sample`` returns some of the numbers, ``[C, S]``; magnitudes are float32. One pass counts the
    magnitudes above the range that the sample predicts and keeps those inside it, which contain the level
    unless the sample was misleading. In that case the function counts bit patterns, which sort like the
    magnitudes: one pass over the upper halves, and a second one over the lower halves inside the bin that
    the first found. Memory is bounded in both cases.

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
    """Returns the rank of the level among ``count`` magnitudes; 1 is the largest."""
    return min(count, max(1, round(share * count)))


def _select_near(values: Numbers, share: float, sample: np.ndarray) -> np.ndarray | None:
    """Computes :func:`level` if it lies in the range that the sample predicts and that range holds few
    magnitudes; otherwise returns None.
    """
    ordered = np.sort(sample, axis=1)[:, ::-1]
    count = sample.shape[1]
    # At least four standard deviations of a sampled rank, which are at most sqrt(count) / 2 each, plus slack.
    spread = 0.005 * count + 2 * np.sqrt(count)
    first = round(share * count - spread)
    last = round(share * count + spread)
    low = ordered[:, last] if last < count else np.zeros(len(sample), np.float32)
    high = ordered[:, first] if first >= 0 else np.full(len(sample), np.inf, np.float32)
    near: list[list[np.ndarray]] = [[] for _ in sample]
    above = np.zeros(len(sample), np.int64)
    size = 0
    for piece in values():
        rows = _rows(piece)
        size += rows.shape[1]
        for number, row in enumerate(rows):
            # Everything at or above `high` is only counted; the range [low, high) is kept for the exact
            # selection.
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


def _select_by_bits(values: Numbers, share: float) -> np.ndarray:
    """Computes :func:`level` by counting bit patterns."""
    # The bits of non-negative floats sort like the floats, so a histogram of the upper halves brackets the
    # level.
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
    """Returns the bin in which the ``counts``, summed from the last bin down, reach ``place``, and the place
    inside that bin.

    Example:
        >>> _reach(np.array([4, 3, 0, 2]), 3)
        (1, 1)
    """
    sums = np.cumsum(counts[::-1])
    number = int(np.searchsorted(sums, place))
    bin_of_place = len(counts) - 1 - number
    return bin_of_place, place - int(sums[number] - counts[bin_of_place])


def _rows(piece: np.ndarray) -> np.ndarray:
    """Returns the magnitudes as ``[C, N]``."""
    return magnitudes(piece).reshape(len(piece), -1)


def _bits(row: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(row).view(np.uint32)
