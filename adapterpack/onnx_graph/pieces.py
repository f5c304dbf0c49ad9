"""Describes which part of a checkpoint's matrix is stored in which part of an initializer."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .graph_file import GraphFile, StoredTensor
from .nbits import NBits


class WeightPiece(NamedTuple):
    """Part of a matrix ``M`` ``[out, in]`` of a checkpoint, and where a graph stores it.

    Along ``axis`` (0: rows, 1: columns) ``start`` to ``stop`` of ``M`` are in ``initializer`` from ``at`` on;
    the other axis is complete. ``transposed``: the initializer holds ``M`` transposed. ``slot`` is the index
    of the matrix in a stack of three axes, or None if all axes after the first are columns. ``nbits`` is the
    MatMulNBits node of a quantized weight.
    """

    initializer: str
    start: int
    stop: int
    at: int
    axis: int = 0
    transposed: bool = False
    slot: int | None = None
    nbits: NBits | None = None

    @property
    def layout(self) -> str:
        """The layout in words, for reports: ``rows``, ``columns``, with ``, transposed`` or ``, N bits``."""
        along = "rows" if self.axis == 0 else "columns"
        how = f", {self.nbits.bits} bits" if self.nbits else ", transposed" if self.transposed else ""
        return f"{along} {self.start}-{self.stop} at {self.at}{how}"


class MatrixView(NamedTuple):
    """An initializer viewed as a matrix ``[rows, columns]``; :class:`WeightPiece` defines ``transposed`` and
    ``slot``.
    """

    initializer: str
    transposed: bool
    slot: int | None
    matrix: np.ndarray


def views(
    graph: GraphFile, floats: frozenset[np.dtype[Any]], axes: tuple[int, ...] = (2, 3, 4, 5)
) -> list[MatrixView]:
    """Yields every float initializer of a graph as a matrix, as it is stored and transposed."""
    matrices = []
    for name, place in graph.stored.items():
        if place.dtype in floats and len(place.shape) in axes and place.nbytes:
            matrices += [
                MatrixView(name, transposed, slot, orient(whole, transposed))
                for slot in slots(place)
                for whole in (as_matrix(graph.array(name), slot),)
                for transposed in (False, True)
            ]
    return matrices


def slots(place: StoredTensor) -> list[int | None]:
    """Returns the ways to view an initializer as a matrix: None for all later axes as columns and, for three
    axes, the index of each matrix of the stack.
    """
    stacked = list(range(place.shape[0])) if len(place.shape) == 3 else []
    return [None, *stacked]


def as_matrix(array: np.ndarray, slot: int | None) -> np.ndarray:
    """Returns one of the matrices of an initializer, without a copy."""
    matrix: np.ndarray = array.reshape(len(array), -1) if slot is None else array[slot]
    return matrix


def orient(matrix: np.ndarray, transposed: bool) -> np.ndarray:
    """Returns the matrix, or its transpose."""
    return matrix.T if transposed else matrix


def coverage(pieces: list[WeightPiece], shape: tuple[int, int]) -> int:
    """Returns how many numbers of a matrix of that shape are in at least one of the ``pieces``."""
    best = 0
    for axis in (0, 1):
        mask = np.zeros(shape[axis], bool)
        for piece in pieces:
            if piece.axis == axis:
                mask[piece.start : piece.stop] = True
        best = max(best, int(mask.sum()) * shape[1 - axis])
    return best
