"""What is done for one tensor of the output, or for one stretch of unchanged bytes: a few kinds of jobs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..adapter_methods import LAYOUTS
from ..base.codecs.storage import MAIN_PART, Encoded, Storage
from ..base.rounding import Round, Rounding
from ..errors import NonFinite
from ..io.buffers import Scratch
from ..io.byte_ranges import Span, copy_span, opened, write_all
from ..io.progress import Ticker
from ..io.safetensors import DTYPES
from .fold.blocks import ELEMENTS, Arithmetic, Block
from .fold.fold import slice_of
from .fold.loss import Sums, sums_of
from .layout import Item, Shard
from .plan import Target
from .report import TensorLoss


class Run(NamedTuple):
    """What all jobs of a merge share."""

    folder: Path
    ticker: Ticker
    safe: bool
    rounding: Rounding
    arithmetic: Arithmetic


class Tensor(NamedTuple):
    """An item and the shard that it belongs to."""

    item: Item
    shard: Shard

    def write(self, run: Run) -> Any:
        """The file that the tensor goes to, opened."""
        return opened(run.folder / self.shard.name, os.O_WRONLY)


@dataclass(frozen=True)
class Job:
    """A piece of work that any worker can do; ``files`` are the output files that it writes to, ``nbytes`` is what it writes."""

    files: frozenset[str]
    nbytes: int

    def run(self, run: Run, scratch: Scratch) -> Sums | None:
        """Does it; the sums are those of a changed weight."""
        raise NotImplementedError


@dataclass(frozen=True)
class Copy(Job):
    """Unchanged bytes."""

    shard: Shard
    span: Span

    def run(self, run: Run, scratch: Scratch) -> None:
        """See :class:`Job`."""
        with opened(self.shard.base.path, os.O_RDONLY) as source, opened(run.folder / self.shard.name, os.O_WRONLY) as sink:
            copy_span(source, sink, self.span, lambda count: scratch.get("copy", (count,), np.dtype(np.uint8)))
        run.ticker.add(self.span.nbytes)


@dataclass(frozen=True)
class Put(Job):
    """A module that was trained whole."""

    tensor: Tensor

    def run(self, run: Run, scratch: Scratch) -> None:
        """See :class:`Job`."""
        place, value = self.tensor.item.place, self.tensor.item.value
        assert value is not None
        stored = np.ascontiguousarray(value, dtype=DTYPES[place.dtype])
        judge(stored, value, run.safe, place.name)
        with self.tensor.write(run) as sink:
            write_all(sink, stored, place.offset)
        run.ticker.add(stored.nbytes)


class Parts:
    """The tensors of one weight in the output, by role, open to be written block by block.

    Rows of a part are written as they come. A part that has the outputs in its columns is gathered in memory, as small as it is stored, and
    written at the end. All of its bytes are ticked once.
    """

    def __init__(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        self._run, self._tensors, self._stack = run, tensors, ExitStack()
        self._gathered: dict[str, np.ndarray] = {}
        self._written = dict.fromkeys(tensors, 0)

    def __enter__(self) -> Parts:
        self._sinks = {role: self._stack.enter_context(tensor.write(self._run)) for role, tensor in self._tensors.items()}
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def write(self, stored: Encoded) -> None:
        """Writes the updates of a block."""
        self._run.ticker.check()
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
        """Writes what was gathered, and what no block was written to."""
        for role, written in self._written.items():
            if role in self._gathered or not written:
                self._put(role, np.ascontiguousarray(self._gathered.get(role, rest(role))), 0)

    def _put(self, role: str, values: np.ndarray, at: int) -> None:
        write_all(self._sinks[role], values, self._tensors[role].item.place.offset + at)
        self._written[role] += values.nbytes
        self._run.ticker.add(values.nbytes)


@dataclass(frozen=True)
class Convert(Job):
    """A weight in another dtype, or in numbers where it was quantized."""

    tensor: Tensor
    storage: Storage

    def run(self, run: Run, scratch: Scratch) -> None:
        """See :class:`Job`."""
        (reader, writer), name = self.storage, self.tensor.item.place.name
        rows, columns = reader.shape
        with reader.opened() as read, Parts(run, {MAIN_PART: self.tensor}) as parts:
            for block in blocks(rows, columns, reader.step, ELEMENTS):
                raw = read(block, columns, scratch)
                values = reader.decode(raw, scratch)
                stored = writer.encode(values, block, run.rounding(name, block.start * columns), scratch)
                judge(stored.raw, values, run.safe, name)
                parts.write(stored)


@dataclass(frozen=True)
class Fold(Job):
    """All adapters of one weight, and what changes with it - its bias, the scales of a quantized weight: computed in float32, rounded once.

    ``parts`` are the weight's tensors by role. A weight whose stored rows are not output rows is folded whole where its change is more than
    plain factors; a stack of weights one after the other.
    """

    target: Target
    parts: Mapping[str, Tensor]
    bias: Tensor | None

    def run(self, run: Run, scratch: Scratch) -> Sums:
        """See :class:`Job`."""
        target, storage, place = self.target, self.target.storage, self.parts[MAIN_PART].item.place
        reader, sums, done = storage.reader, Sums(), 0
        bias = _Bias(self.bias, target.bias, reader.work)
        with reader.opened() as read, Parts(run, self.parts) as parts:
            for number, matrix in enumerate(reader.matrices(target.kind)):
                change = run.arithmetic.prepare([slice_of(each, number) for each in target.contributions], reader.work, matrix,
                                                target.base_bias)
                sums += Sums(change=run.arithmetic.energy(change) or 0.0)
                for block in _blocks(change, matrix.shape, LAYOUTS[target.kind].turned, storage, run.arithmetic):
                    count = block.columns if block.turned else block.rows.stop - block.rows.start
                    across = (block.rows.stop - block.rows.start) if block.turned else block.columns
                    stored = slice(done // max(1, across), done // max(1, across) + count)
                    raw = read(stored, across, scratch)
                    whole = Block(raw, stored, block.rows, block.turned, bias.part(block.rows))
                    write = _Judged(parts, run.safe, place.name)
                    found, after = run.arithmetic.fold(block.change, storage, whole, run.rounding(place.name, done), scratch, write,
                                                       sums.moved)
                    write.judge(found)
                    bias.put(block.rows, after)
                    sums += found
                    done += raw.size
            parts.finish(storage.writer.rest)
        return sums + bias.write(run, scratch)

    def loss(self, sums: Sums) -> TensorLoss:
        """What was lost in storing the weight."""
        item = self.parts[MAIN_PART].item
        name = item.place.name.removesuffix(self.target.storage.main_tensor) + self.target.weight
        return sums.loss(name, self.target.storage.writer.label)


class _Part(NamedTuple):
    """A block of a matrix ``[out, in]`` and the change to apply to it; ``turned``: the stored bytes are those of the transpose."""

    change: Any
    rows: slice
    columns: int
    turned: bool


def _blocks(change: Any, shape: tuple[int, int], turned: bool, storage: Storage, arithmetic: Arithmetic) -> Iterator[_Part]:
    rows, columns = shape
    if turned and (other := arithmetic.turned(change)) is not None:
        change, turned, rows, columns = other, False, columns, rows
    if turned or arithmetic.is_whole(change):
        yield _Part(change, slice(0, rows), columns, turned)
        return
    for block in blocks(rows, columns, storage.reader.step, arithmetic.elements(change, storage)):
        yield _Part(change, block, columns, turned)


_TILES = (24, 12)
"""Rows that are a multiple of what any kernel takes at once: with the 8 of this package's own, and those of OpenBLAS alone."""


def blocks(rows: int, columns: int, step: int, elements: int) -> Iterator[slice]:
    """Rows in blocks of about ``elements`` numbers that begin at multiples of ``step``.

    Where they may, they begin at multiples of 24 or 12, too: OpenBLAS's kernels go through a product in such steps and add up in another
    order in what is left over, so that its blocks are then those of the whole product, bit for bit.

    Example:
        >>> list(blocks(10, 100, 4, 500))
        [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
    """
    step = next((tile for tile in _TILES if elements >= tile * columns), 1) if step == 1 else step
    size = max(step, elements // max(1, columns) // step * step)
    for start in range(0, rows, size):
        yield slice(start, min(rows, start + size))


class _Judged:
    """Writes a block, and under ``safe`` refuses one that is not finite: native floats at once, others where the sums look strange."""

    def __init__(self, parts: Parts, safe: bool, name: str) -> None:
        self._parts, self._safe, self._name = parts, safe, name
        self._raw: np.ndarray | None = None

    def __call__(self, stored: Encoded) -> None:
        if stored.raw.dtype in {np.dtype(np.float32), np.dtype(np.float64)}:
            judge(stored.raw, None, self._safe, self._name)
        else:
            self._raw = stored.raw
        self._parts.write(stored)

    def judge(self, sums: Sums) -> None:
        if self._raw is not None and not math.isfinite(sums.error):
            judge(self._raw, None, self._safe, self._name)


class _Bias:
    """The bias of a weight, which changes block by block with it; nothing where it stays."""

    def __init__(self, tensor: Tensor | None, name: str | None, dtype: np.dtype[Any]) -> None:
        self._tensor = tensor
        if tensor is not None and name is not None:
            self._before = tensor.shard.base.read(name).astype(dtype)
            self._after = np.empty_like(self._before)

    def part(self, rows: slice) -> np.ndarray | None:
        return None if self._tensor is None else self._before[rows]

    def put(self, rows: slice, after: np.ndarray | None) -> None:
        if self._tensor is not None and after is not None:
            self._after[rows] = after

    def write(self, run: Run, scratch: Scratch) -> Sums:
        if self._tensor is None:
            return Sums()
        place = self._tensor.item.place
        rounding: Round = run.rounding(place.name, 0)
        stored = rounding(self._after, DTYPES[place.dtype], scratch)
        judge(stored, None, run.safe, place.name)
        with self._tensor.write(run) as sink:
            write_all(sink, stored, place.offset)
        run.ticker.add(stored.nbytes)
        change, back = self._after - self._before, stored.astype(self._before.dtype)
        return sums_of(change[None], ((back - self._before) - change)[None], bool(np.any(back != self._before)))


def judge(stored: np.ndarray, given: np.ndarray | None, safe: bool, name: str) -> None:
    """Raises :class:`NonFinite` under ``safe`` if ``stored`` holds NaN or infinity that ``given`` did not hold."""
    if safe and not np.isfinite(stored).all() and (given is None or np.isfinite(given).all()):
        raise NonFinite("the merged tensor holds NaN or infinity", where=name,
                        remedy="merge with a wider dtype; if that does not help, the base or the adapter holds it already")
