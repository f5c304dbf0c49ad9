"""Finds biases and the weights of norms in a graph: in one initializer, packed with others, or split over
several.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .graph_file import FLOATS, GraphFile
from .pieces import WeightPiece
from .rows import cast


def find_vector(graph: GraphFile, vector: np.ndarray) -> list[WeightPiece]:
    """Returns the initializers that store ``vector`` ``[n]``, or parts of it, bit by bit after a cast to
    their dtype.

    The pieces are those of the column ``[n, 1]``.
    """
    whole: list[WeightPiece] = []
    parts: list[WeightPiece] = []
    for name, place in graph.stored.items():
        width = place.dtype.itemsize
        if place.dtype not in FLOATS or place.nbytes <= width or max(place.shape) * width != place.nbytes:
            continue
        stored = graph.array(name).reshape(-1)
        wanted = cast(vector, stored.dtype)
        is_row = len(place.shape) > 1 and place.shape[0] == 1
        if len(stored) >= len(wanted):
            whole += [WeightPiece(name, 0, len(wanted), at, 0, is_row) for at in _positions(wanted, stored)]
        else:
            parts += [
                WeightPiece(name, start, start + len(stored), 0, 0, is_row)
                for start in _positions(stored, wanted)
            ]
    return whole or parts


def _positions(short: np.ndarray, long: np.ndarray) -> Iterator[int]:
    """Yields the positions of ``short`` in ``long``; of overlapping ones only the first."""
    a, b = _bits(short), _bits(long)
    free = 0
    for at in np.flatnonzero(b[: len(b) - len(a) + 1] == a[0]).tolist():
        if at >= free and np.array_equal(b[at : at + len(a)], a):
            yield at
            free = at + len(a)


def _bits(values: np.ndarray) -> Any:
    return np.ascontiguousarray(values).view(np.dtype(f"u{values.dtype.itemsize}"))
