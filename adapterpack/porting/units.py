"""Finds which outputs and inputs of one weight are which of another's, and how far the two are apart then.

A change ``D`` of the old weight is carried as ``P D Q``, where ``P W Q`` is the old weight in the new one's
order. Units are matched by their weights (Ainsworth, Hayase and Srinivasa 2022, arXiv 2209.04836, section
3.2), for one weight at a time and by cosines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..lowrank import Factors

_LEAST = 0.5
"""The least cosine of a unit's weights in both bases."""
_BLOCK = 1 << 24
"""How many cosines are computed at once."""


class Units(NamedTuple):
    """For each output (``rows`` ``[m]``) and each input (``columns`` ``[n]``) of a new weight the place of
    the same unit in the old one; -1 where it has none.

    Example:
        >>> Units(np.array([1, -1]), np.array([0, 1])).reorder(np.array([[1.0, 2.0], [3.0, 4.0]]))
        array([[3., 4.],
               [0., 0.]])
    """

    rows: np.ndarray
    columns: np.ndarray

    def reorder(self, matrix: np.ndarray) -> np.ndarray:
        """Returns ``P W Q`` of an old matrix; zero where a unit is new."""
        return _take(_take(matrix, self.rows).T, self.columns).T

    def transfer(self, change: Factors) -> Factors:
        """Returns the factors of ``P D Q``."""
        return Factors(_take(change.A.T, self.columns).T, _take(change.B, self.rows))


def closest(old: np.ndarray, new: np.ndarray, enough: float) -> tuple[float, Units]:
    """Returns the least ``||W_new - P W_old Q||_F / ||W_new||_F``, and its units; 1 without any unit if
    neither side has the width that it had.

    Units are first left where they are, which is all if that comes close ``enough``. Otherwise the inputs
    stay and the outputs are looked for, or the other way round: this finds hidden units and heads that were
    reordered or removed, while the residual stream stays in place.
    """
    best = 1.0, Units(*(np.full(side, -1) for side in new.shape))
    size = float(np.linalg.norm(new)) + 1e-30
    for units in _candidates(old, new):
        distance = float(np.linalg.norm(new - units.reorder(old))) / size
        best = min(best, (distance, units), key=lambda one: one[0])
        if distance <= enough:
            break
    return best


def _candidates(old: np.ndarray, new: np.ndarray) -> Iterator[Units]:
    rows, columns = map(np.arange, new.shape)
    if old.shape == new.shape:
        yield Units(rows, columns)
    if old.shape[1] == new.shape[1]:
        yield Units(_same_rows(old, new), columns)
    if old.shape[0] == new.shape[0]:
        yield Units(rows, _same_rows(old.T, new.T))


def _take(matrix: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Returns rows of a matrix; zero for a place of -1."""
    return np.where(places[:, None] < 0, 0, matrix[places])


def _same_rows(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Returns for each new row the old row with the largest cosine; -1 if it is not large enough."""
    before, after = (rows / (np.linalg.norm(rows, axis=1)[:, None] + 1e-30) for rows in (old, new))
    step = max(1, _BLOCK // len(old))
    blocks = (after[start : start + step] for start in range(0, len(after), step))
    place = np.concatenate([(block @ before.T).argmax(axis=1) for block in blocks])
    place[np.vecdot(after, before[place]) < _LEAST] = -1
    return place
