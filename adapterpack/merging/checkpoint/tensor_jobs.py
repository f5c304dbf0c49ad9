"""The jobs of a merge: copy unchanged bytes, write a given tensor, convert a tensor to another dtype, or
merge adapters into a weight.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...adapter_methods import LAYOUTS, Arrays
from ...base import Rounding, WeightStorage
from ...base.codecs.storage import MAIN_PART, EncodedRows
from ...errors import NonFinite
from ...io import DTYPES, Scratch, Span, Ticker, all_finite, copy_span, open_descriptor, write_all
from ..fold import ELEMENTS, Arithmetic, Change, LossSums, TensorLoss, WeightBlock, slice_of, sums_of
from .layout import Item, Shard
from .plan import MergeTarget


class MergeContext(NamedTuple):
    """What all jobs of a merge use."""

    folder: Path
    ticker: Ticker
    safe: bool
    rounding: Rounding
    arithmetic: Arithmetic


class MergedTensor(NamedTuple):
    """An item and the shard that it belongs to."""

    item: Item
    shard: Shard

    def write(self, context: MergeContext) -> Any:
        """Opens the output file of the tensor."""
        return open_descriptor(context.folder / self.shard.name, os.O_WRONLY)


@dataclass(frozen=True)
class TensorJob:
    """A unit of work for any worker; ``files`` are the output files that it writes to, ``nbytes`` how much it
    writes.
    """

    files: frozenset[str]
    nbytes: int

    def run(self, context: MergeContext, scratch: Scratch) -> LossSums | None:
        """Does the work; returns the sums of a changed weight.

        Raises:
            NonFinite: a result is NaN, or beyond what is computed in; with ``safe``, too large for its dtype.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Copy(TensorJob):
    """Copies unchanged bytes."""

    shard: Shard
    span: Span

    def run(self, context: MergeContext, scratch: Scratch) -> None:
        """Copies the bytes of its span."""
        with (
            open_descriptor(self.shard.base, os.O_RDONLY) as source,
            open_descriptor(context.folder / self.shard.name, os.O_WRONLY) as sink,
        ):
            copy_span(
                source, sink, self.span, lambda count: scratch.get("copy", (count,), np.dtype(np.uint8))
            )
        context.ticker.add(self.span.nbytes)


@dataclass(frozen=True)
class Put(TensorJob):
    """Writes a tensor of a fully trained module."""

    tensor: MergedTensor

    def run(self, context: MergeContext, scratch: Scratch) -> None:
        """Writes the new value."""
        place, value = self.tensor.item.place, self.tensor.item.value
        assert value is not None
        stored = np.ascontiguousarray(value, dtype=DTYPES[place.dtype])
        require_finite(stored, value, context.safe, place.name)
        with self.tensor.write(context) as sink:
            write_all(sink, stored, place.offset)
        context.ticker.add(stored.nbytes)


class OutputParts:
    """The output tensors of one weight, by role, open to be written block by block.

    Rows of a part are written at once. A part that has the outputs in its columns is gathered in memory and
    written at the end. Every byte counts once for the progress.
    """

    def __init__(self, context: MergeContext, tensors: Mapping[str, MergedTensor]) -> None:
        self._context = context
        self._tensors = tensors
        self._stack = ExitStack()
        self._gathered: Arrays = {}
        self._written = dict.fromkeys(tensors, 0)

    def __enter__(self) -> OutputParts:
        self._sinks = {
            role: self._stack.enter_context(tensor.write(self._context))
            for role, tensor in self._tensors.items()
        }
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def write(self, stored: EncodedRows) -> None:
        """Writes the updates of a block."""
        self._context.ticker.check()
        for piece in stored.updates:
            place = self._tensors[piece.part].item.place
            if piece.columns is not None:
                if piece.part not in self._gathered:
                    self._gathered[piece.part] = np.empty(place.shape, DTYPES[place.dtype])
                self._gathered[piece.part][piece.rows, piece.columns] = piece.values
                continue
            values = np.ascontiguousarray(piece.values)
            at = piece.rows.start * (values.nbytes // max(1, piece.rows.stop - piece.rows.start))
            self._put(piece.part, values, at)

    def finish(self, rest: Callable[[str], np.ndarray]) -> None:
        """Writes the gathered parts, and those that no block updated."""
        for role, written in self._written.items():
            if role in self._gathered or not written:
                self._put(role, np.ascontiguousarray(self._gathered.get(role, rest(role))), 0)

    def _put(self, role: str, values: np.ndarray, at: int) -> None:
        write_all(self._sinks[role], values, self._tensors[role].item.place.offset + at)
        self._written[role] += values.nbytes
        self._context.ticker.add(values.nbytes)


@dataclass(frozen=True)
class Convert(TensorJob):
    """Writes a weight in another dtype, or dequantized."""

    tensor: MergedTensor
    storage: WeightStorage

    def run(self, context: MergeContext, scratch: Scratch) -> None:
        """Rounds the tensor to its new dtype."""
        (reader, writer), name = self.storage, self.tensor.item.place.name
        rows, columns = reader.shape
        with reader.opened() as read, OutputParts(context, {MAIN_PART: self.tensor}) as parts:
            for block in blocks(rows, columns, reader.step, ELEMENTS):
                raw = read(block, columns, scratch)
                values = reader.decode(raw, scratch)
                stored = writer.encode(values, block, context.rounding(name, block.start * columns), scratch)
                if context.safe:
                    require_finite(stored.raw, values, True, name)
                parts.write(stored)


@dataclass(frozen=True)
class Fold(TensorJob):
    """Merges all adapters of one weight, and what changes with it (its bias, the scales of a quantized
    weight): in float32, rounded once.

    ``parts`` are the weight's tensors by role. A weight that is stored transposed is processed in one block
    where its change is more than a product of factors; the matrices of a stack one after the other.
    """

    target: MergeTarget
    parts: Mapping[str, MergedTensor]
    bias: MergedTensor | None

    def run(self, context: MergeContext, scratch: Scratch) -> LossSums:
        """Folds the change into the weight and returns the sums of its loss."""
        target = self.target
        storage = self.target.storage
        place = self.parts[MAIN_PART].item.place
        reader = storage.reader
        sums = LossSums()
        done = 0
        before = after = written = None
        if self.bias is not None and target.base_bias is not None:
            before = target.base_bias.astype(reader.work)
            after = np.empty_like(before)
        with reader.opened() as read, OutputParts(context, self.parts) as parts:

            def write(stored: EncodedRows) -> None:
                nonlocal written
                if context.safe and stored.raw.dtype in {np.dtype(np.float32), np.dtype(np.float64)}:
                    require_finite(stored.raw, None, True, place.name)
                written = stored.raw
                parts.write(stored)

            for number, matrix in enumerate(reader.matrices(target.kind)):
                contributions = [slice_of(contribution, number) for contribution in target.contributions]
                change = context.arithmetic.prepare(contributions, reader.work, matrix, target.base_bias)
                sums += LossSums(change=change.energy or 0.0)
                for block in _blocks(
                    change, matrix.shape, LAYOUTS[target.kind].turned, storage, context.arithmetic
                ):
                    sides = block.rows.stop - block.rows.start, block.columns
                    count, across = reversed(sides) if block.transposed else sides
                    start = done // max(1, across)
                    held = slice(start, start + count)
                    raw = read(held, across, scratch)
                    offset = None if before is None else before[block.rows]
                    old = WeightBlock(raw, held, block.rows, block.transposed, offset)
                    rounding = context.rounding(place.name, done)
                    block_sums, moved = context.arithmetic.fold(
                        block.change, storage, old, rounding, scratch, write, sums.moved
                    )
                    if written is not None and not math.isfinite(block_sums.error):
                        require_finite(written, None if context.safe else raw, context.safe, place.name)
                    if after is not None and moved is not None:
                        after[block.rows] = moved
                    sums += block_sums
                    done += raw.size
            parts.finish(storage.writer.rest)
        if self.bias is None or before is None or after is None:
            return sums
        return sums + _write_bias(self.bias, before, after, context, scratch)

    def loss(self, sums: LossSums) -> TensorLoss:
        """Returns the loss by storing the weight."""
        item = self.parts[MAIN_PART].item
        name = item.place.name.removesuffix(self.target.storage.main_tensor) + self.target.weight
        return sums.loss(name, self.target.storage.writer.label)


class _Part(NamedTuple):
    """A block of a matrix ``[out, in]`` and its change; ``transposed`` says that the transpose of the matrix
    is stored.
    """

    change: Change
    rows: slice
    columns: int
    transposed: bool


def _blocks(
    change: Change, shape: tuple[int, int], transposed: bool, storage: WeightStorage, arithmetic: Arithmetic
) -> Iterator[_Part]:
    rows, columns = shape
    if transposed and (other := change.transposed()) is not None:
        change, transposed, rows, columns = other, False, columns, rows
    if transposed or change.whole:
        yield _Part(change, slice(0, rows), columns, transposed)
        return
    for block in blocks(rows, columns, storage.reader.step, arithmetic.elements(change, storage)):
        yield _Part(change, block, columns, transposed)


_TILES = (24, 12)
"""Multiples of the rows that a matrix kernel processes at once: of this package's (8) and OpenBLAS's, and of
OpenBLAS's alone.
"""


def blocks(rows: int, columns: int, step: int, elements: int) -> Iterator[slice]:
    """Rows in blocks of about ``elements`` numbers that begin at multiples of ``step``.

    Where possible they also begin at multiples of 24 or 12: OpenBLAS's kernels process a product in such
    steps and add up in another order in the remainder, so that the products of blocks then equal the whole
    product bit for bit.

    Example:
        >>> list(blocks(10, 100, 4, 500))
        [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
    """
    step = next((tile for tile in _TILES if elements >= tile * columns), 1) if step == 1 else step
    size = max(step, elements // max(1, columns) // step * step)
    for start in range(0, rows, size):
        yield slice(start, min(rows, start + size))


def _write_bias(
    tensor: MergedTensor, before: np.ndarray, after: np.ndarray, context: MergeContext, scratch: Scratch
) -> LossSums:
    """Rounds and writes the changed bias of a weight, and returns the sums of its loss."""
    place = tensor.item.place
    stored = context.rounding(place.name, 0)(after, DTYPES[place.dtype], scratch)
    require_finite(stored, None if context.safe else before, context.safe, place.name)
    with tensor.write(context) as sink:
        write_all(sink, stored, place.offset)
    context.ticker.add(stored.nbytes)
    change = after - before
    reread = stored.astype(before.dtype)
    return sums_of(change[None], ((reread - before) - change)[None], bool(np.any(reread != before)))


_WIDE = frozenset({"float32", "float64", "bfloat16"})
"""Dtypes that can hold every number that a merge computes: an infinity there was infinite before rounding."""


def require_finite(
    stored: np.ndarray, original: np.ndarray | None, safe: bool, name: str, dtype: np.dtype | None = None
) -> None:
    """Checks that ``stored``, of ``dtype`` or by default its own, has no NaN or infinity where ``original``
    has none.

    Without ``safe``, a number that is too large for a narrow dtype may become infinity (or NaN, in a dtype
    without infinity).

    Raises:
        NonFinite: it has one.
    """
    if all_finite(stored) or (original is not None and not all_finite(original)):
        return
    narrow = (stored.dtype if dtype is None else dtype).name not in _WIDE
    if safe or not narrow or (np.isnan(stored).any() and stored.dtype.itemsize > 1):
        raise NonFinite(
            "the merged tensor holds NaN or infinity",
            where=name,
            remedy=(
                "merge with a wider dtype; if that does not help, the base or the adapter holds it already"
            ),
        )
