"""Equal runs of rows in two sets of matrices, found by a short key of every row and then compared in full.

A weight that was packed with others, sliced, transposed or cast is still there row by row (or column by column), in runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from ..adapter_methods import row_blocks

_PROBED = 8
"""Neighbouring numbers of a row that make its key: what they cannot tell apart, the full comparison does."""
Key = TypeVar("Key", bound=Hashable)


class Run(NamedTuple):
    """Rows ``start`` to ``stop`` of one matrix are rows ``at`` and on of another."""

    start: int
    stop: int
    at: int


def cast(rows: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Rows in another floating dtype, rounded to nearest even, as an exporter casts a weight."""
    with np.errstate(all="ignore"):  # an overflow is infinite on both sides
        return rows.astype(dtype, copy=False)


def find_runs(wanted: Mapping[Key, np.ndarray], held: Sequence[np.ndarray]) -> Iterator[tuple[Key, int, list[Run]]]:
    """For each pair of a wanted matrix and a held one that share rows: the runs in which they are equal, bit by bit.

    Wanted matrices are cast to the dtype of the held one before they are compared. All matrices ``[rows, columns]``.
    """
    tables: dict[tuple[int, np.dtype[Any]], _Table[Key]] = {}
    for number, matrix in enumerate(held):
        width = (matrix.shape[1], matrix.dtype)
        if width not in tables:
            tables[width] = _Table({key: one for key, one in wanted.items() if one.shape[1] == width[0]}, matrix.dtype)
        for key, runs in tables[width].find(matrix):
            yield key, number, runs


class _Table(Generic[Key]):
    """The keys of all rows of the wanted matrices of one width, sorted."""

    def __init__(self, wanted: Mapping[Key, np.ndarray], dtype: np.dtype[Any]) -> None:
        self.dtype, self.wanted, self.names = dtype, wanted, list(wanted)
        self.keys = {name: _keys(matrix, dtype) for name, matrix in wanted.items()}
        every = np.concatenate([self.keys[name] for name in self.names]) if self.names else np.empty(0, np.uint64)
        self.order = np.argsort(every, kind="stable")
        self.sorted = every[self.order]
        sizes = [len(self.keys[name]) for name in self.names]
        self.owner = np.repeat(np.arange(len(sizes)), sizes)
        self.row = np.concatenate([np.arange(size) for size in sizes]) if sizes else np.empty(0, np.int64)

    def find(self, matrix: np.ndarray) -> Iterator[tuple[Key, list[Run]]]:
        """The runs of every wanted matrix in ``matrix``."""
        if not len(self.sorted):
            return
        keys = _keys(matrix, self.dtype)
        left, right = np.searchsorted(self.sorted, keys, "left"), np.searchsorted(self.sorted, keys, "right")
        single = right - left == 1
        alone = self._votes(np.where(single, left, 0), np.where(single, right, 0))
        several = self._votes(left, np.minimum(right, left + _MANY))
        votes = [*alone, *(vote for vote, _ in several.most_common(_LIKELY) if vote[0] not in {owner for owner, _ in alone})]
        found: dict[int, list[Run]] = {}
        for owner, shift in sorted(votes):
            name = self.names[owner]
            found.setdefault(owner, []).extend(_equal(self.wanted[name], self.keys[name], matrix, keys, shift))
        for owner, runs in found.items():
            if runs:
                yield self.names[owner], runs

    def _votes(self, left: np.ndarray, right: np.ndarray) -> Counter[tuple[int, int]]:
        """How many rows of an initializer, each with the places of its key among ours, say: that matrix, shifted by so much."""
        places = _spread(left, right)
        hits = self.order[places.column]
        pairs, counts = np.unique(np.stack([self.owner[hits], places.row - self.row[hits]]), axis=1, return_counts=True)
        return Counter({(int(owner), int(shift)): int(count) for (owner, shift), count in zip(pairs.T, counts, strict=True)})


_MANY, _LIKELY = 4, 64
"""For rows whose key is not theirs alone, such as zeros: places followed up for each, and shifts tried in all."""


class _Pairs(NamedTuple):
    row: np.ndarray
    column: np.ndarray


def _spread(left: np.ndarray, right: np.ndarray) -> _Pairs:
    """Every (row, place) with ``left[row] <= place < right[row]``."""
    counts = right - left
    row = np.repeat(np.arange(len(left)), counts)
    inner = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return _Pairs(row, left[row] + inner)


def _keys(matrix: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """One number for each row, of a few of its neighbouring columns as they are in ``dtype``."""
    start = max(0, (matrix.shape[1] - _PROBED) // 2)
    probe = np.ascontiguousarray(cast(matrix[:, start : start + _PROBED], dtype))
    raw = probe.view(np.uint8).reshape(len(matrix), -1).astype(np.uint64)
    mixed = np.zeros(len(matrix), np.uint64)
    for column in raw.T:  # FNV-1a
        mixed = (mixed ^ column) * np.uint64(0x100000001B3) + np.uint64(0x9E3779B97F4A7C15)
    return mixed


def _equal(wanted: np.ndarray, wanted_keys: np.ndarray, held: np.ndarray, held_keys: np.ndarray, shift: int) -> list[Run]:
    """The runs in which row ``r`` of ``wanted`` is row ``r + shift`` of ``held``."""
    low, high = max(0, -shift), min(len(wanted), len(held) - shift)
    likely = wanted_keys[low:high] == held_keys[low + shift : high + shift]
    equal = np.zeros(len(wanted), bool)
    for start, stop in true_runs(likely):
        for block in row_blocks(stop - start, wanted.shape[1]):
            a, b = low + start + block.start, low + start + block.stop
            ours = np.ascontiguousarray(cast(wanted[a:b], held.dtype))
            theirs = np.ascontiguousarray(held[a + shift : b + shift])
            equal[a:b] = (ours.view(np.uint8).reshape(b - a, -1) == theirs.view(np.uint8).reshape(b - a, -1)).all(axis=1)
    return [Run(start, stop, start + shift) for start, stop in true_runs(equal)]


def true_runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Where a mask is true: (start, stop) of each run."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
