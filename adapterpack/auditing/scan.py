"""Scans the entries of dense changes, by blocks of rows, for conflicting signs and for the loss by rounding.

Scans all rows where that is cheap or requested, else a sample of rows from a generator that the site's path
seeds (Philox4x64, Salmon et al., SC 2011): the same rows in every run and on every machine.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..adapter_methods import row_blocks
from ..io import DTYPES
from ..lowrank import Terms, gram
from ..merging.fold import LossSums, sums_of

SAMPLE = 1 << 20
"""The entries to scan at a site, unless the caller requests all."""
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Entries:
    """Sums over entries of changes, each with the sign of its weight; sums over a sample are scaled up to all
    rows.

    ``mixed`` of ``counted`` entries have both signs. Of the ``large`` entries, at which at least two changes
    exceed their own root mean square, ``large_mixed`` have both signs. ``absolute`` ``[T, T]`` is ``sum |D_i
    D_j|`` and ``signed`` the same without the bars. ``left`` is ``sum |sum_i w_i D_i|`` and ``whole`` is
    ``sum sum_i |w_i D_i|``.
    """

    counted: float
    mixed: float
    large: float
    large_mixed: float
    absolute: np.ndarray
    signed: np.ndarray
    left: float
    whole: float

    def __add__(self, other: Entries) -> Entries:
        return Entries(*map(operator.add, vars(self).values(), vars(other).values()))

    def scaled(self, factor: float) -> Entries:
        """Returns every sum times a factor."""
        return Entries(*(factor * value for value in vars(self).values()))

    @property
    def conflict(self) -> float:
        """The share of entries at which changes have both signs; about ``1 - 2^(1-T)`` for T unrelated
        ones.
        """
        return self.mixed / self.counted if self.counted else 0.0

    @property
    def large_conflict(self) -> float:
        """The same among the large entries; NaN where no entry is large in two changes."""
        return self.large_mixed / self.large if self.large else math.nan

    @property
    def cancelled(self) -> float:
        """``1 - sum |sum w D| / sum sum |w D|``: the share of all absolute values that cancels; about ``1 - 1
        / sqrt(T)`` for unrelated changes.
        """
        return 1 - self.left / self.whole if self.whole else 0.0

    @property
    def pairs(self) -> np.ndarray:
        """``[T, T]``: the share of ``sum |D_i D_j|`` at entries where the signs differ: 0 for the same
        direction, 1 for opposite ones, about a half for unrelated changes; NaN where the two changes have no
        common entry.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            shares: np.ndarray = np.clip((1 - self.signed / self.absolute) / 2, 0, 1)
        return shares


def rows_of(path: str, m: int, n: int, entries: int | None = SAMPLE) -> np.ndarray:
    """Returns the sorted rows of a site ``[m, n]`` to scan: all rows if they hold at most ``entries`` or if
    that is None, else a sample.

    Example:
        >>> rows_of("layer", 4, 3), len(rows_of("layer", 4000, 3000)), (rows_of("a", 9, 9, 18) == rows_of("a",
        ...     9, 9, 18)).all()
        (array([0, 1, 2, 3]), 349, np.True_)
    """
    if entries is None or m * n <= entries:
        return np.arange(m)
    key = int.from_bytes(hashlib.sha256(f"adapterpack audit\0{path}".encode()).digest()[:16], "little")
    drawn = np.random.Philox(key=key).random_raw(m)
    return np.sort(np.argsort(drawn, kind="stable")[: max(1, entries // n)])


def scan(terms: Terms, rows: np.ndarray) -> Entries:
    """Sums over the entries of these rows, scaled up to all rows."""
    changes = [term.change for term in terms]
    (m, n), count = changes[0].shape, len(terms)
    signs = np.array([math.copysign(1.0, term.weight) for term in terms])
    sizes = np.array([abs(term.weight) for term in terms])
    least = np.sqrt(np.maximum(np.diag(gram(terms)), 0) / max(1, m * n))[:, None]
    total = Entries(0.0, 0.0, 0.0, 0.0, np.zeros((count, count)), np.zeros((count, count)), 0.0, 0.0)
    for block in _blocks(rows, n * count):
        D = np.stack([change.rows(block).ravel().astype(np.float64) for change in changes]) * signs[:, None]
        absolute = np.abs(D)
        large = (absolute >= least) & (absolute > 0)
        up = (large & (D > 0)).sum(axis=0)
        down = (large & (D < 0)).sum(axis=0)
        total += Entries(
            float(D.shape[1]),
            float(np.count_nonzero((D.max(axis=0) > 0) & (D.min(axis=0) < 0))),
            float(np.count_nonzero(up + down > 1)),
            float(np.count_nonzero((up > 0) & (down > 0))),
            absolute @ absolute.T,
            D @ D.T,
            float(np.abs(sizes @ D).sum()),
            float((sizes @ absolute).sum()),
        )
    return total.scaled(m / max(1, len(rows)))


def norm_of(weight: np.ndarray) -> float:
    """Returns ``|W|_F^2`` in float64, computed by blocks of rows."""
    total = 0.0
    for block in row_blocks(len(weight), weight.shape[1], _BLOCK):
        wide = weight[block].astype(np.float64)
        total += float(np.vdot(wide, wide))
    return total


def fold_losses(
    terms: Terms, weight: np.ndarray, rows: np.ndarray, dtypes: Sequence[str]
) -> Mapping[str, LossSums]:
    """Measures how storing ``W + sum w_i D_i`` in each dtype (by its safetensors name) alters the change,
    scaled up to all rows.
    """
    losses = {dtype: LossSums() for dtype in dtypes}
    kind = np.float64 if weight.dtype == np.float64 else np.float32
    changes = [(term.weight, term.change) for term in terms]
    for block in _blocks(rows, weight.shape[1]) if dtypes else ():
        W = weight[block].astype(kind)
        change = sum((share * factors.rows(block) for share, factors in changes), np.zeros(W.shape)).astype(
            kind
        )
        for dtype in dtypes:
            with np.errstate(over="ignore"):
                stored = (W + change).astype(DTYPES[dtype]).astype(kind)
            error = stored.astype(np.float64) - W - change
            moved = bool((stored != W).any())
            losses[dtype] += sums_of(change, error.astype(kind), moved)
    factor = weight.shape[0] / max(1, len(rows))
    return {
        dtype: LossSums(factor * sums.change, factor * sums.error, factor * sums.inner, sums.moved)
        for dtype, sums in losses.items()
    }


def _blocks(rows: np.ndarray, columns: int) -> Iterator[np.ndarray[Any, Any]]:
    for block in row_blocks(len(rows), columns, _BLOCK):
        yield rows[block]
