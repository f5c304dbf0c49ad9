"""Describes which part of a checkpoint's matrix is stored in which part of an initializer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .graph_file import FLOATS, GraphFile
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


def views(graph: GraphFile) -> Iterator[MatrixView]:
    """Yields every float initializer of a graph as a matrix, as it is stored and transposed: with all later
    axes as columns and, for three axes, each matrix of the stack.
    """
    for name, place in graph.stored.items():
        if place.dtype in FLOATS and 2 <= len(place.shape) <= 5 and place.nbytes:
            for slot in (None, *range(place.shape[0] if len(place.shape) == 3 else 0)):
                matrix = as_matrix(graph.array(name), slot)
                yield MatrixView(name, False, slot, matrix)
                yield MatrixView(name, True, slot, matrix.T)


def as_matrix(array: np.ndarray, slot: int | None) -> np.ndarray:
    """Returns one of the matrices of an initializer, without a copy."""
    return array.reshape(len(array), -1) if slot is None else array[slot]


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
