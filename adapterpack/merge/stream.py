"""The bytes of a merge: tensors copied, converted or folded from the base's files straight to their place in the output's."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from ..errors import NonFinite
from ..methods import LAYOUTS, row_blocks, to_matrix
from ..pack.safetensors import DTYPES
from .bytes_io import Span, copy_span, opened, read_into, write_all
from .fold import LossSums, Scratch, matrices, prepare, slice_of, work_dtype
from .layout import Item, Shard
from .report import TensorLoss

Progress = Callable[[int, int], None]
Job = Callable[[Scratch], "TensorLoss | None"]
_CHUNK = 4 << 20


class StoppedError(Exception):
    """Another worker failed, or the user interrupted: that is the error to show."""


class Ticker:
    """Counts the bytes that all workers have done, reports them, and stops every worker when one has failed."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.stopped = False
        self._done, self._total, self._progress, self._lock = 0, total, progress, threading.Lock()

    def add(self, nbytes: int) -> None:
        """Notes that ``nbytes`` more are written."""
        with self._lock:
            if self.stopped:
                raise StoppedError
            self._done += nbytes
            if self._progress is not None:
                try:
                    self._progress(self._done, self._total)
                except BaseException:  # an interrupt too; noted under the lock, so that no other call follows
                    self.stopped = True
                    raise


def write(shards: Sequence[Shard], folder: Path, *, safe: bool, workers: int, progress: Progress | None) -> list[TensorLoss]:
    """Writes all output files into ``folder`` and returns the fold loss of every changed weight, in the order of the files.

    Memory: a few row blocks for each worker, whatever the size of the tensors.

    Raises:
        NonFinite: with ``safe``, a result is NaN or infinite.
        OSError: the file system refuses.
    """
    ticker = Ticker(sum(shard.size for shard in shards), progress)
    for shard in shards:
        with opened(folder / shard.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as sink:
            write_all(sink, np.frombuffer(shard.header, np.uint8), 0)
            os.truncate(sink, shard.size)
        ticker.add(len(shard.header))
    scratches: SimpleQueue[Scratch] = SimpleQueue()
    for _ in range(workers):
        scratches.put(Scratch())

    def run(job: Job) -> TensorLoss | None:
        scratch = scratches.get()
        try:
            with np.errstate(all="ignore"):  # overflow is judged by its result
                return job(scratch)
        except BaseException:
            ticker.stopped = True
            raise
        finally:
            scratches.put(scratch)

    with ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(run, job) for job in _jobs(shards, folder, ticker, safe)]
            failures = [error for future in futures if (error := future.exception()) is not None]
        except BaseException:  # an interrupt while waiting
            ticker.stopped = True
            raise
    for failure in sorted(failures, key=lambda error: isinstance(error, StoppedError)):
        raise failure
    return [loss for future in futures if (loss := future.result()) is not None]


class _Tensor(NamedTuple):
    """An item, the shard that it belongs to, and the output file."""

    item: Item
    shard: Shard
    out: Path


def _jobs(shards: Sequence[Shard], folder: Path, ticker: Ticker, safe: bool) -> Iterator[Job]:
    """One job for each changed, converted or new tensor and for each chunk of copied bytes; every job opens its files itself."""
    tensors = [_Tensor(item, shard, folder / shard.name) for shard in shards for item in shard.items]
    biases = {tensor.item.bias_of: tensor for tensor in tensors}
    for tensor in tensors:
        item = tensor.item
        if item.target is not None:
            yield partial(_fold, tensor, biases.get(item.target.weight), ticker, safe)
        elif item.value is not None:
            yield partial(_put, tensor, item.value, ticker, safe)
        elif item.bias_of is None and not _same(item):
            yield partial(_convert, tensor, ticker, safe)
    for shard in shards:
        unchanged = [item for item in shard.items if item.target is None and item.value is None and item.bias_of is None and _same(item)]
        for span in _spans(unchanged):
            yield partial(_copy, shard, folder / shard.name, span, ticker)


def _same(item: Item) -> bool:
    return item.source is not None and item.source.dtype == item.place.dtype


def _spans(items: Sequence[Item]) -> Iterator[Span]:
    """Where unchanged tensors lie and go, neighbours joined, cut into chunks."""
    spans: list[list[int]] = []
    for item in items:
        assert item.source is not None
        start, offset, nbytes = item.source.offset, item.place.offset, item.place.nbytes
        if spans and spans[-1][0] + spans[-1][2] == start and spans[-1][1] + spans[-1][2] == offset:
            spans[-1][2] += nbytes
        else:
            spans.append([start, offset, nbytes])
    for start, offset, nbytes in spans:
        for done in range(0, nbytes, _CHUNK):
            yield Span(start + done, offset + done, min(_CHUNK, nbytes - done))


def _copy(shard: Shard, out: Path, span: Span, ticker: Ticker, scratch: Scratch) -> None:
    with opened(shard.base.path, os.O_RDONLY) as source, opened(out, os.O_WRONLY) as sink:
        copy_span(source, sink, span, lambda count: scratch.get("copy", (count,), np.dtype(np.uint8)))
    ticker.add(span.nbytes)


def _put(tensor: _Tensor, value: np.ndarray, ticker: Ticker, safe: bool, scratch: Scratch) -> None:
    """Writes a module that was trained whole."""
    place = tensor.item.place
    stored = np.ascontiguousarray(value, dtype=DTYPES[place.dtype])
    _judge(stored, value, safe, place.name)
    with opened(tensor.out, os.O_WRONLY) as sink:
        write_all(sink, stored, place.offset)
    ticker.add(stored.nbytes)


def _convert(tensor: _Tensor, ticker: Ticker, safe: bool, scratch: Scratch) -> None:
    """Copies a tensor into another dtype."""
    source, place = tensor.item.source, tensor.item.place
    assert source is not None
    narrow, wide = DTYPES[source.dtype], DTYPES[place.dtype]
    with opened(tensor.shard.base.path, os.O_RDONLY) as reader, opened(tensor.out, os.O_WRONLY) as sink:
        for block in row_blocks(math.prod(source.shape), 1):
            raw = scratch.get("raw", (block.stop - block.start,), narrow)
            read_into(reader, raw, source.offset + block.start * narrow.itemsize)
            stored = scratch.get("stored", raw.shape, wide)
            np.copyto(stored, raw, casting="unsafe")
            _judge(stored, raw, safe, place.name)
            write_all(sink, stored, place.offset + block.start * wide.itemsize)
            ticker.add(stored.nbytes)


def _fold(tensor: _Tensor, bias: _Tensor | None, ticker: Ticker, safe: bool, scratch: Scratch) -> TensorLoss:
    """Folds all adapters of one weight, and the bias that changes with it: in float32, rounded once.

    A weight whose stored rows are not output rows is folded whole; a stack of weights one after the other.
    """
    target, source, place = tensor.item.target, tensor.item.source, tensor.item.place
    assert target is not None
    assert source is not None
    dtype, read, stored_as = work_dtype(source.dtype), DTYPES[source.dtype], DTYPES[place.dtype]
    before = None if target.bias is None or bias is None else bias.shard.base.read(target.bias).astype(dtype)
    after = None if before is None else np.empty_like(before)
    sums = LossSums()
    turned, done = LAYOUTS[target.kind].turned, 0
    with opened(tensor.shard.base.path, os.O_RDONLY) as reader, opened(tensor.out, os.O_WRONLY) as sink:
        for number, matrix in enumerate(matrices(target.kind, to_matrix(target.kind, tensor.shard.base.read(source.name)))):
            change = prepare([slice_of(each, number) for each in target.contributions], dtype, matrix, target.base_bias)
            rows, columns = matrix.shape
            for block in iter((slice(0, rows),)) if change.whole or turned else row_blocks(rows, columns):
                count = block.stop - block.start
                shape = (columns, count) if turned else (count, columns)
                raw = scratch.get("raw", shape, read)
                read_into(reader, raw, source.offset + done * read.itemsize)
                old = _as(raw, dtype, scratch, "old")
                new, delta = scratch.get("new", shape, dtype), scratch.get("change", shape, dtype)
                lying = (old.T, delta.T, new.T) if turned else (old, delta, new)
                moved = change.apply(lying[0], None if before is None else before[block], block, lying[1], lying[2])
                if after is not None:
                    after[block] = moved
                stored = _as(new, stored_as, scratch, "stored")
                write_all(sink, stored, place.offset + done * stored_as.itemsize)
                _account(sums, (old, delta, new, stored), safe, place.name)
                ticker.add(stored.nbytes)
                done += raw.size
    if before is not None and after is not None and bias is not None:
        at = bias.item.place
        stored = after.astype(DTYPES[at.dtype])
        with opened(bias.out, os.O_WRONLY) as sink:
            write_all(sink, stored, at.offset)
        _account(sums, (before, after - before, after, stored), safe, at.name)
        ticker.add(stored.nbytes)
    return sums.loss(place.name, place.dtype)


def _as(value: np.ndarray, dtype: np.dtype[Any], scratch: Scratch, name: str) -> np.ndarray:
    """``value`` itself if it has that dtype, else a copy in the scratch buffer of that name, rounded to nearest even."""
    if value.dtype == dtype:
        return value
    converted = scratch.get(name, value.shape, dtype)
    np.copyto(converted, value, casting="unsafe")
    return converted


def _account(sums: LossSums, block: tuple[np.ndarray, ...], safe: bool, name: str) -> None:
    """Accounts for a block (old, change, new, new as it was stored); all but the last are used up."""
    old, delta, new, stored = block
    if stored is not new:
        np.copyto(new, stored, casting="unsafe")
    if not sums.add(old, delta, new) and safe:
        _judge(new, None, safe, name)


def _judge(stored: np.ndarray, given: np.ndarray | None, safe: bool, name: str) -> None:
    """Raises :class:`NonFinite` under ``safe`` if ``stored`` holds NaN or infinity that ``given`` did not hold."""
    if safe and not np.isfinite(stored).all() and (given is None or np.isfinite(given).all()):
        raise NonFinite("the merged tensor holds NaN or infinity", where=name,
                        remedy="merge with a wider dtype; if that does not help, the base or the adapter holds it already")
