"""Finds exact order statistics of the magnitudes of many numbers in few passes and little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from .._native import passes

_MOST_IN_MEMORY = 1 << 22
"""The most numbers that are kept in memory to select from: 16 MB."""
_SAMPLED = 1 << 24
"""Numbers of a sample up to which what lies about the expected level is kept: a few hundredths of 15 times as
many.
"""


def magnitudes(values: np.ndarray) -> np.ndarray:
    """``|x|`` in float32, in which magnitudes are ranked."""
    absolute: np.ndarray = np.abs(values).astype(np.float32, copy=False)
    return absolute


def level(
    values: Callable[[], Iterator[np.ndarray]],
    share: float,
    sample: Callable[[], np.ndarray | None] | None = None,
) -> np.ndarray:
    """``[C]``: of each of ``C`` rows of numbers, the magnitude that a ``share`` of them reaches or exceeds,
    exactly.

    ``values`` gives pieces ``[C, ...]``, the same ones each time, and ``sample`` some of the numbers, ``[C,
    S]``; magnitudes are those of float32. In one pass those above what the sample expects are counted and
    those about it kept, among which it is, unless the sample misled. Then, without a sample, or of more than
    a bearable number of them, the bit patterns are counted, which are in their order: one pass counts the
    upper halves, one the lower halves inside the bin that was found. So memory is 98304 counters a row,
    whatever the size. Without the compiled kernel a bearable number of them is kept in memory and selected
    from.

    Example:
        >>> piece = np.arange(10, dtype=np.float32)[None]
        >>> level(lambda: iter([piece[:, :4], -piece[:, 4:]]), 0.3)
        array([7.], dtype=float32)
    """
    if not passes.compiled() and (numbers := _in_memory(values)) is not None:
        wanted = numbers.shape[1] - min(numbers.shape[1], max(1, round(share * numbers.shape[1])))
        return np.partition(numbers, wanted, axis=1)[:, wanted] if numbers.size else np.zeros(0, np.float32)
    if passes.compiled() and sample is not None and (near := _near(values, share, sample())) is not None:
        return near
    high, sizes = np.zeros((0, passes.UPPER), np.int64), 0
    for piece in values():
        high, sizes = (
            high if len(high) else np.zeros((len(piece), passes.UPPER), np.int64),
            sizes + piece[0].size,
        )
        for counts, row in zip(high, _rows(piece), strict=True):
            passes.count_upper(row, counts)
    wanted = min(sizes, max(1, round(share * sizes)))
    upper = [passes.reached(counts, wanted) for counts in high]
    low = np.zeros((len(high), passes.LOWER), np.int64)
    for piece in values():
        for counts, row, (bin_of_row, _) in zip(low, _rows(piece), upper, strict=True):
            passes.count_lower(row, bin_of_row, counts)
    bits = [
        bin_of_row << 16 | passes.reached(counts, wanted - above)[0]
        for counts, (bin_of_row, above) in zip(low, upper, strict=True)
    ]
    return np.array(bits, np.uint32).view(np.float32)


def _near(
    values: Callable[[], Iterator[np.ndarray]], share: float, sample: np.ndarray | None
) -> np.ndarray | None:
    """:func:`level`, if it is where the sample expects it."""
    if sample is None or not sample.shape[1] or sample.shape[1] * len(sample) > _SAMPLED:
        return None
    spread = 0.01 + 2 / np.sqrt(sample.shape[1])
    counts = np.zeros((len(sample), passes.UPPER), np.int64)
    for row, row_counts in zip(_rows(sample), counts, strict=True):
        passes.count_upper(row, row_counts)
    ranges = [_about(row_counts, share * sample.shape[1], spread * sample.shape[1]) for row_counts in counts]
    sizes = 0
    for piece in values():
        sizes += piece[0].size
        for row, between in zip(_rows(piece), ranges, strict=True):
            between.add(row)
    places = [min(sizes, max(1, round(share * sizes))) - between.above for between in ranges]
    if not all(1 <= place <= between.count for place, between in zip(places, ranges, strict=True)):
        return None
    return np.array(
        [between.largest(place) for place, between in zip(places, ranges, strict=True)], np.float32
    )


def _about(counts: np.ndarray, wanted: float, spread: float) -> passes.Between:
    """Collects the magnitudes of ranks ``wanted - spread`` to ``wanted + spread`` by ``counts`` of a sample,
    whole bins at both ends.
    """
    high = (passes.reached(counts, round(wanted - spread))[0] + 1) << 16 if wanted - spread >= 1 else 1 << 31
    low = passes.reached(counts, round(wanted + spread))[0] << 16 if wanted + spread < counts.sum() else 0
    return passes.Between(low, high)


def _in_memory(values: Callable[[], Iterator[np.ndarray]]) -> np.ndarray | None:
    """All magnitudes, ``[C, ...]``, if they are few enough."""
    pieces: list[np.ndarray] = []
    for piece in values():
        pieces.append(magnitudes(piece).reshape(len(piece), -1))
        if sum(part.size for part in pieces) > _MOST_IN_MEMORY:
            return None
    return np.concatenate(pieces, axis=1) if pieces else np.zeros((0, 0), np.float32)


def _rows(piece: np.ndarray) -> np.ndarray:
    """``[C, N]`` in float32, C-contiguous."""
    return np.ascontiguousarray(piece, np.float32).reshape(len(piece), -1)
