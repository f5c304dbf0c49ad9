"""Finds runs of equal rows in two sets of matrices: by a short key of every row, then by comparing full rows.

A weight that was packed with others, sliced, transposed or cast is still stored row by row (or column by
column), in runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from ..adapter_methods import row_blocks

_PROBED = 8
"""Adjacent numbers of a row from which its key is computed; rows with equal keys are then compared in full.
"""
_BAND = 64
"""Columns of a transposed matrix to copy at a time, so that the rows that they touch stay in the cache."""
Key = TypeVar("Key", bound=Hashable)


class RowRun(NamedTuple):
    """Rows ``start`` to ``stop`` of one matrix equal the rows from ``at`` on of another."""

    start: int
    stop: int
    at: int


def cast(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Casts rows to another floating dtype, rounding to nearest even, as an exporter casts a weight."""
    with np.errstate(all="ignore"):  # an overflow gives infinity on both sides
        return rows.astype(dtype, copy=False)


def in_order(array: np.ndarray) -> np.ndarray:
    """Returns an array row by row in memory, a transposed matrix as a copy. numpy would copy it number by
    number.

    Example:
        >>> in_order(np.arange(6).reshape(2, 3).T).flags.c_contiguous
        True
    """
    if array.flags.c_contiguous or array.ndim != 2:
        return np.ascontiguousarray(array)
    copy = np.empty(array.shape, array.dtype)
    for column in range(0, array.shape[1], _BAND):
        copy[:, column : column + _BAND] = array[:, column : column + _BAND]
    return copy


def find_runs(
    wanted: Mapping[Key, np.ndarray], stored: Sequence[np.ndarray]
) -> Iterator[tuple[Key, int, list[RowRun]]]:
    """Returns for each pair of a wanted and a stored matrix that share rows the runs in which they are equal,
    bit by bit.

    Casts wanted matrices to the dtype of the stored one first. All matrices are ``[rows, columns]``.
    """
    tables: dict[tuple[int, np.dtype], _Table[Key]] = {}
    for number, matrix in enumerate(stored):
        width = (matrix.shape[1], matrix.dtype)
        if width not in tables:
            tables[width] = _Table(
                {key: matrix for key, matrix in wanted.items() if matrix.shape[1] == width[0]}, matrix.dtype
            )
        for key, runs in tables[width].runs_in(matrix):
            yield key, number, runs


class _Table(Generic[Key]):
    """The sorted keys of all rows of the wanted matrices of one width."""

    def __init__(self, wanted: Mapping[Key, np.ndarray], dtype: np.dtype) -> None:
        self.dtype = dtype
        self.wanted = wanted
        self.names = list(wanted)
        self.keys = {name: _keys(matrix, dtype) for name, matrix in wanted.items()}
        all_keys = (
            np.concatenate([self.keys[name] for name in self.names]) if self.names else np.empty(0, np.uint64)
        )
        self.order = np.argsort(all_keys, kind="stable")
        self.sorted = all_keys[self.order]
        sizes = [len(self.keys[name]) for name in self.names]
        self.owner = np.repeat(np.arange(len(sizes)), sizes)
        self.row = np.concatenate([np.arange(size) for size in sizes]) if sizes else np.empty(0, np.int64)

    def runs_in(self, matrix: np.ndarray) -> Iterator[tuple[Key, list[RowRun]]]:
        """Yields the runs of every wanted matrix in ``matrix``."""
        if not len(self.sorted):
            return
        keys = _keys(matrix, self.dtype)
        left = np.searchsorted(self.sorted, keys, "left")
        right = np.searchsorted(self.sorted, keys, "right")
        # rows whose key occurs once vote reliably; rows such as zeros match everywhere, so their votes are
        # limited
        single = right - left == 1
        unambiguous = self._votes(np.where(single, left, 0), np.where(single, right, 0))
        ambiguous = self._votes(left, np.minimum(right, left + _MANY))
        votes = [
            *unambiguous,
            *(
                vote
                for vote, _ in ambiguous.most_common(_LIKELY)
                if vote[0] not in {owner for owner, _ in unambiguous}
            ),
        ]
        for owner, shifts in groupby(sorted(votes), key=itemgetter(0)):
            name = self.names[owner]
            wanted, own_keys = self.wanted[name], self.keys[name]
            if runs := [run for _, shift in shifts for run in _equal(wanted, own_keys, matrix, keys, shift)]:
                yield name, runs

    def _votes(self, left: np.ndarray, right: np.ndarray) -> Counter[tuple[int, int]]:
        """Counts for each (wanted matrix, shift) the rows of the stored matrix whose key equals that of the
        wanted row at that shift.
        """
        rows, places = _spread(left, right)
        hits = self.order[places]
        pairs, counts = np.unique(
            np.stack([self.owner[hits], rows - self.row[hits]]), axis=1, return_counts=True
        )
        return Counter(
            {
                (int(owner), int(shift)): int(count)
                for (owner, shift), count in zip(pairs.T, counts, strict=True)
            }
        )


_MANY, _LIKELY = 4, 64
"""Limits for rows whose key is not unique, such as rows of zeros: places to consider for each row, and shifts
in all.
"""


def _spread(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows and the places of every pair with ``left[row] <= place < right[row]``."""
    counts = right - left
    row = np.repeat(np.arange(len(left)), counts)
    inner = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return row, left[row] + inner


def _keys(matrix: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns one key for each row, computed from a few of its adjacent columns in ``dtype``."""
    start = max(0, (matrix.shape[1] - _PROBED) // 2)
    probe = np.ascontiguousarray(cast(matrix[:, start : start + _PROBED], dtype))
    raw = probe.view(np.uint8).reshape(len(matrix), -1).astype(np.uint64)
    mixed = np.zeros(len(matrix), np.uint64)
    for column in raw.T:  # FNV-1a
        mixed = (mixed ^ column) * np.uint64(0x100000001B3) + np.uint64(0x9E3779B97F4A7C15)
    return mixed


def _equal(
    wanted: np.ndarray, wanted_keys: np.ndarray, stored: np.ndarray, stored_keys: np.ndarray, shift: int
) -> list[RowRun]:
    """Returns the runs in which row ``r`` of ``wanted`` equals row ``r + shift`` of ``stored``."""
    low = max(0, -shift)
    high = min(len(wanted), len(stored) - shift)
    # the keys are cheap: compare full rows only where they agree
    likely = wanted_keys[low:high] == stored_keys[low + shift : high + shift]
    equal = np.zeros(len(wanted), bool)
    for start, stop in true_runs(likely):
        for block in row_blocks(stop - start, wanted.shape[1]):
            a, b = low + start + block.start, low + start + block.stop
            wanted_rows = np.ascontiguousarray(cast(wanted[a:b], stored.dtype))
            stored_rows = np.ascontiguousarray(stored[a + shift : b + shift])
            equal[a:b] = (
                wanted_rows.view(np.uint8).reshape(b - a, -1) == stored_rows.view(np.uint8).reshape(b - a, -1)
            ).all(axis=1)
    return [RowRun(start, stop, start + shift) for start, stop in true_runs(equal)]


def true_runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Returns (start, stop) of each run in which a mask is true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
