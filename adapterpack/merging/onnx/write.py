"""Writes blocks of a changed matrix to their places in the files of a graph."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...io import write_all
from ...onnx_graph import (
    GraphFile,
    NBits,
    StoredTensor,
    WeightPiece,
    as_matrix,
    dequantize,
    grid_of,
    pack_zeros,
    requantize,
)


class WrittenBlock(NamedTuple):
    """Part of a matrix before and after the write, in float32; ``rows`` and ``columns`` locate it, and
    ``dtype`` is the stored dtype of its numbers, float32 if they are codes.
    """

    rows: slice
    columns: slice
    before: np.ndarray
    after: np.ndarray
    dtype: np.dtype


class GraphWriter:
    """The output's open files (``sinks``), in which the initializers are at the same places as in ``graph``,
    the source.
    """

    def __init__(self, graph: GraphFile, sinks: Mapping[Path, int]) -> None:
        self.graph, self.sinks = graph, sinks

    def put(self, piece: WeightPiece, rows: slice, new: np.ndarray) -> WrittenBlock | None:
        """Writes the part of the rows ``new`` ``[count, in]`` of a matrix that is in ``piece``; None if there
        is none.
        """
        if piece.axis == 1:
            columns = slice(piece.start, piece.stop)
            before, after = self._put_floats(piece, rows.start, piece.at, new[:, columns])
            return WrittenBlock(rows, columns, before, after, self.graph.stored[piece.initializer].dtype)
        start = max(rows.start, piece.start)
        stop = min(rows.stop, piece.stop)
        if start >= stop:
            return None
        part = new[start - rows.start : stop - rows.start]
        at = start - piece.start + piece.at
        if piece.nbits is None:
            before, after = self._put_floats(piece, at, 0, part)
            dtype = self.graph.stored[piece.initializer].dtype
        else:
            before, after = self._put_codes(piece.nbits, slice(at, at + stop - start), part)
            dtype = np.dtype(np.float32)
        return WrittenBlock(slice(start, stop), slice(0, new.shape[1]), before, after, dtype)

    def _put_floats(
        self, piece: WeightPiece, row: int, column: int, part: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        place = self.graph.stored[piece.initializer]
        matrix = as_matrix(self.graph.array(piece.initializer), piece.slot)
        view = matrix.T if piece.transposed else matrix
        rows = slice(row, row + part.shape[0])
        columns = slice(column, column + part.shape[1])
        before = view[rows, columns].astype(part.dtype)
        with np.errstate(all="ignore"):  # an overflow shows in the result
            stored = part.astype(place.dtype)
        skipped = 0 if piece.slot is None else piece.slot * matrix.size
        as_stored, first = (stored.T, (column, row)) if piece.transposed else (stored, (row, column))
        self._rectangle(
            place,
            skipped + first[0] * matrix.shape[1] + first[1],
            matrix.shape[1],
            np.ascontiguousarray(as_stored),
        )
        return before, stored.astype(part.dtype)

    def _rectangle(self, place: StoredTensor, first: int, width: int, part: np.ndarray) -> None:
        """Writes ``part`` with its first number at element ``first`` of an initializer whose rows are
        ``width`` long.
        """
        sink = self.sinks[place.file]
        size = place.dtype.itemsize
        if part.shape[1] == width or len(part) == 1:
            write_all(sink, part, place.offset + first * size)
            return
        for number, line in enumerate(part):
            write_all(sink, line, place.offset + (first + number * width) * size)

    def _put_codes(self, one: NBits, rows: slice, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        old = grid_of(self.graph, one, rows)
        before = dequantize(self.graph, one, rows)
        scales = self.graph.stored[one.scales]
        rounded = requantize(one, part.astype(np.float32), old, scales.dtype)
        self._lines(one.weight, one.rows, rows, rounded.packed)
        self._lines(one.scales, one.rows, rows, rounded.grid.scale.astype(scales.dtype))
        if one.zeros is not None:
            self._lines(one.zeros, one.rows, rows, pack_zeros(one.bits, rounded.grid))
        return before, rounded.values

    def _lines(self, name: str, count: int, rows: slice, part: np.ndarray) -> None:
        place = self.graph.stored[name]
        write_all(
            self.sinks[place.file],
            np.ascontiguousarray(part),
            place.offset + rows.start * (place.nbytes // count),
        )


@contextmanager
def opened_all(files: Mapping[Path, Path]) -> Iterator[dict[Path, int]]:
    """Yields the output file of each source file, open for writing."""
    sinks: dict[Path, int] = {}
    try:
        for source, target in files.items():
            sinks[source] = os.open(target, os.O_WRONLY)
        yield sinks
    finally:
        for sink in sinks.values():
            os.close(sink)
