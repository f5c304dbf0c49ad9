"""What is done for one tensor of the output, or for one stretch of unchanged bytes: a few kinds of jobs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import NonFinite
from ..methods import LAYOUTS, to_matrix
from ..pack.safetensors import DTYPES
from .blocks import Arithmetic, Block
from .bytes_io import Span, copy_span, opened, read_into, write_all
from .codecs import Codec, Plain
from .fold import matrices, slice_of
from .layout import Item, Shard
from .loss import Sums, sums_of
from .rounding import Round, Rounding
from .scratch import Scratch
from .ticker import Ticker


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

    def read(self) -> Any:
        """The file that the tensor is made from, opened."""
        return opened(self.shard.base.path, os.O_RDONLY)

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


@dataclass(frozen=True)
class Convert(Job):
    """A tensor in another dtype."""

    tensor: Tensor

    def run(self, run: Run, scratch: Scratch) -> None:
        """See :class:`Job`."""
        source, place = self.tensor.item.source, self.tensor.item.place
        assert source is not None
        narrow, wide = DTYPES[source.dtype], DTYPES[place.dtype]
        with self.tensor.read() as reader, self.tensor.write(run) as sink:
            for start, count in _pieces(math.prod(source.shape), 1 << 18):
                raw = scratch.get("raw", (count,), narrow)
                read_into(reader, raw, source.offset + start * narrow.itemsize)
                values = Plain(source.dtype, place.dtype).decode(raw, slice(0, count), scratch)
                stored = run.rounding(place.name, start)(values, wide, scratch)
                judge(stored, raw, run.safe, place.name)
                write_all(sink, stored, place.offset + start * wide.itemsize)
                run.ticker.add(stored.nbytes)


@dataclass(frozen=True)
class Fold(Job):
    """All adapters of one weight, and what changes with it - its bias, the scales of a quantized weight - by name: computed in float32,
    rounded once.

    A weight whose stored rows are not output rows is folded whole where its change is more than plain factors; a stack of weights one after
    the other.
    """

    tensor: Tensor
    companions: Mapping[str, Tensor]

    def run(self, run: Run, scratch: Scratch) -> Sums:
        """See :class:`Job`."""
        item, shard = self.tensor.item, self.tensor.shard
        target, source, place = item.target, item.source, item.place
        assert target is not None
        assert source is not None
        codec = target.codec.fresh()
        bias = _Bias(self.companions.get(target.bias or ""), target.bias, codec.work)
        read, sums, done = DTYPES[source.dtype], Sums(), 0
        with self.tensor.read() as reader, self.tensor.write(run) as sink:
            weight = to_matrix(target.kind, shard.base.read(source.name))
            for number, matrix in enumerate(matrices(target.kind, weight)):
                change = run.arithmetic.prepare([slice_of(each, number) for each in target.contributions], codec.work, matrix,
                                                target.base_bias)
                for block in _blocks(change, matrix.shape, LAYOUTS[target.kind].turned, codec, run.arithmetic):
                    count = block.columns if block.turned else block.rows.stop - block.rows.start
                    across = (block.rows.stop - block.rows.start) if block.turned else block.columns
                    raw = scratch.get("raw", (count, across), read)
                    read_into(reader, raw, source.offset + done * read.itemsize)
                    at = place.offset + done * DTYPES[place.dtype].itemsize
                    first = done // across
                    stored = Block(raw, slice(first, first + count), block.rows, block.turned, bias.part(block.rows))
                    writer = _Writer(sink, at, run.safe, place.name)
                    found, after = run.arithmetic.fold(block.change, codec, stored, run.rounding(place.name, done), scratch, writer,
                                                       sums.moved)
                    writer.judge(found)
                    bias.put(block.rows, after)
                    sums += found
                    run.ticker.add(raw.size * DTYPES[place.dtype].itemsize)
                    done += raw.size
        sums += bias.write(run, scratch)
        for name, value in codec.finished().items():
            self._companion(run, name, value)
        return sums

    def _companion(self, run: Run, name: str, value: np.ndarray) -> None:
        tensor = self.companions[name]
        stored = np.ascontiguousarray(value, dtype=DTYPES[tensor.item.place.dtype])
        judge(stored, None, run.safe, name)
        with tensor.write(run) as sink:
            write_all(sink, stored, tensor.item.place.offset)
        run.ticker.add(stored.nbytes)


class _Part(NamedTuple):
    """A block of a matrix ``[out, in]`` and the change to apply to it; ``turned``: the stored bytes are those of the transpose."""

    change: Any
    rows: slice
    columns: int
    turned: bool


def _blocks(change: Any, shape: tuple[int, int], turned: bool, codec: Codec, arithmetic: Arithmetic) -> Iterator[_Part]:
    rows, columns = shape
    if turned and (other := arithmetic.turned(change)) is not None:
        change, turned, rows, columns = other, False, columns, rows
    if turned or arithmetic.is_whole(change):
        yield _Part(change, slice(0, rows), columns, turned)
        return
    step = max(codec.step, arithmetic.elements // max(1, columns) // codec.step * codec.step)
    for start in range(0, rows, step):
        yield _Part(change, slice(start, min(rows, start + step)), columns, turned)


class _Writer:
    """Writes a block, and under ``safe`` refuses one that is not finite: native floats at once, others where the sums look strange."""

    def __init__(self, sink: int, at: int, safe: bool, name: str) -> None:
        self._sink, self._at, self._safe, self._name = sink, at, safe, name
        self._stored: np.ndarray | None = None

    def __call__(self, stored: np.ndarray) -> None:
        if stored.dtype in {np.dtype(np.float32), np.dtype(np.float64)}:
            judge(stored, None, self._safe, self._name)
        else:
            self._stored = stored
        write_all(self._sink, stored, self._at)

    def judge(self, sums: Sums) -> None:
        if self._stored is not None and not math.isfinite(sums.error):
            judge(self._stored, None, self._safe, self._name)


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


def _pieces(total: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, size):
        yield start, min(size, total - start)
