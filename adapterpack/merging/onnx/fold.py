"""Merges one tensor into a graph: computes it block by block as in a checkpoint, and writes it wherever the
graph stores these rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ...adapter_methods import LAYOUTS
from ...base import Checkpoint
from ...io import dtype_name
from ...onnx_graph import TensorPlace, WeightPiece
from ..checkpoint import MergeTarget, blocks, require_finite
from ..fold import ELEMENTS, LossSums, TensorLoss, prepare, slice_of, sums_of
from .write import GraphWriter, WrittenBlock

Tick = Callable[[int], None]


class Folded(NamedTuple):
    """The result for one tensor: its loss, and for a quantized weight its distance from the float weight
    before and after the merge, each relative to that weight's norm.
    """

    loss: TensorLoss
    quantized: tuple[float, float] | None


def fold(
    target: MergeTarget,
    base: Checkpoint,
    places: tuple[TensorPlace, TensorPlace | None],
    writer: GraphWriter,
    safe: bool,
    tick: Tick,
) -> Folded:
    """Writes ``target`` with its contributions to the places of its weight and its bias: in float32, rounded
    once to each stored dtype.

    Raises:
        NonFinite: a result is NaN, or beyond float32; under ``safe``, too large for its dtype.
    """
    place, bias_place = places
    reader = target.storage.reader
    dtype = reader.work
    before = None if target.bias is None else base.read(target.bias).astype(dtype)
    after = None if before is None else np.empty_like(before)
    tally = _Tally()

    def store(
        pieces: Iterable[tuple[WeightPiece, bool]], block: slice, numbers: tuple[np.ndarray, ...], tensor: str
    ) -> None:
        """Writes the new numbers of a block, the last of ``numbers``, to the pieces that hold its rows."""
        for piece, counted in pieces:
            written = writer.put(piece, block, numbers[-1])
            if written is not None:
                tally.add(written, block, numbers, counted, piece)
                _require_finite(written, safe, tensor)

    for number, matrix in enumerate(reader.matrices(target.kind)):
        change = prepare(
            [slice_of(contribution, number) for contribution in target.contributions],
            dtype,
            matrix,
            target.base_bias,
        )
        pieces = list(_count_once(place.pieces[number]))
        for block, (old, delta, new) in _blocks(matrix, dtype, LAYOUTS[target.kind].turned, change.whole):
            moved = change.apply(old, None if before is None else before[block], block, delta, new)
            if after is not None and moved is not None:
                after[block] = moved
            store(pieces, block, (old, delta, new), target.weight)
            tick(new.size)
    if before is not None and after is not None and bias_place is not None:
        columns = (before[:, None], (after - before)[:, None], after[:, None])
        store(_count_once(bias_place.pieces[0]), slice(0, len(after)), columns, bias_place.tensor)
    dtypes = sorted({_dtype(writer, piece) for piece in place.all_pieces})
    return Folded(tally.sums.loss(target.weight, "+".join(dtypes)), tally.quantized)


def put(value: np.ndarray, place: TensorPlace, writer: GraphWriter, safe: bool) -> None:
    """Writes a fully trained module to its place."""
    matrix = value if value.ndim == 2 else value.reshape(len(value), -1)
    for piece in place.pieces[0]:
        written = writer.put(piece, slice(0, len(matrix)), matrix)
        if written is not None:
            _require_finite(written, safe, place.tensor)


def _blocks(
    matrix: np.ndarray, dtype: np.dtype, transposed: bool, whole: bool
) -> Iterator[tuple[slice, tuple[np.ndarray, ...]]]:
    """Blocks of rows as in the merge of a checkpoint, so that the results are equal: arrays for old, change,
    new ``[count, in]``.
    """
    rows, columns = matrix.shape
    for block in iter((slice(0, rows),)) if whole or transposed else blocks(rows, columns, 1, ELEMENTS):
        count = block.stop - block.start
        shape = (columns, count) if transposed else (count, columns)
        old, delta, new = (np.empty(shape, dtype) for _ in range(3))
        np.copyto(old, matrix[block].T if transposed else matrix[block])
        yield block, (old.T, delta.T, new.T) if transposed else (old, delta, new)


def _count_once(pieces: Sequence[WeightPiece]) -> Iterator[tuple[WeightPiece, bool]]:
    """Yields each piece, and whether it counts for the loss: rows that several pieces hold count once."""
    counted: list[tuple[int, int, int]] = []
    for piece in pieces:
        is_copy = any(
            axis != piece.axis or (start < piece.stop and piece.start < stop) for axis, start, stop in counted
        )
        if not is_copy:
            counted.append((piece.axis, piece.start, piece.stop))
        yield piece, not is_copy


class _Tally:
    """Sums up the numbers of a :class:`Folded`."""

    def __init__(self) -> None:
        self.sums = LossSums()
        self._squares = np.zeros(4)
        self._any = False

    def add(
        self,
        written: WrittenBlock,
        block: slice,
        numbers: tuple[np.ndarray, ...],
        counted: bool,
        piece: WeightPiece,
    ) -> None:
        """Adds one written block; ``numbers`` are old, change and new of all of its rows."""
        part = (slice(written.rows.start - block.start, written.rows.stop - block.start), written.columns)
        old, delta, new = (np.ascontiguousarray(values[part]) for values in numbers)
        if piece.nbits is not None:
            self._any = True
            self._squares += [
                _square(written.before - old),
                _square(old),
                _square(written.after - new),
                _square(new),
            ]
        if counted:
            error = written.after - written.before - delta
            self.sums += sums_of(delta, error, bool(np.any(written.after != written.before)))

    @property
    def quantized(self) -> tuple[float, float] | None:
        """The relative distance of the quantized numbers from the float ones, before and after."""
        if not self._any:
            return None
        was, old, now, new = self._squares
        return math.sqrt(was / old) if old else 0.0, math.sqrt(now / new) if new else 0.0


def _square(value: np.ndarray) -> float:
    return float(np.sum(np.square(value), dtype=np.float64))


def _dtype(writer: GraphWriter, piece: WeightPiece) -> str:
    stored = writer.graph.stored[piece.initializer].dtype
    return f"INT{piece.nbits.bits}" if piece.nbits else dtype_name(stored)


def _require_finite(written: WrittenBlock, safe: bool, name: str) -> None:
    require_finite(written.after, None if safe else written.before, safe, name, written.dtype)
