"""The bytes of a merge: tensors copied, converted or folded from the base's files straight to their place in the output's."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from ..errors import NonFinite
from ..methods import LAYOUTS, row_blocks
from ..pack.safetensors import DTYPES
from .blocks import coded_sink, coded_source, plain_sink, plain_source, steps
from .bytes_io import Span, copy_span, opened, read_into, write_all
from .codecs.view import Matrix
from .fold import LossSums, Scratch, prepare, slice_of, work_dtype
from .layout import Item, Shard
from .plan import matrices_of
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

    def check(self) -> None:
        """Stops the calling worker if another one has failed."""
        if self.stopped:
            raise StoppedError

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
    parts: dict[str, dict[str, _Tensor]] = {}
    for tensor in tensors:
        if tensor.item.role is not None and tensor.item.coded is not None:
            parts.setdefault(tensor.item.coded.weight.name, {})[tensor.item.role] = tensor
    for tensor in tensors:
        item = tensor.item
        if item.target is not None:
            yield partial(_fold, tensor, biases.get(item.target.weight), parts.get(item.target.weight), ticker, safe)
        elif item.role is not None:
            continue
        elif item.coded is not None and item.value is None:
            yield partial(_decode, tensor, item.coded, ticker, safe)
        elif item.value is not None:
            yield partial(_put, tensor, item.value, ticker, safe)
        elif item.bias_of is None and not _same(item):
            yield partial(_convert, tensor, ticker, safe)
    for shard in shards:
        unchanged = [item for item in shard.items if item.target is None and item.value is None and item.bias_of is None and _same(item)
                     and item.role is None]
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


def _decode(tensor: _Tensor, matrix: Matrix, ticker: Ticker, safe: bool, scratch: Scratch) -> None:
    """Writes a quantized weight that no adapter changes as the numbers that it stands for."""
    place = tensor.item.place
    with plain_sink(tensor.out, place, scratch) as put:
        for block in steps(*matrix.shape, matrix.weight.step):
            old = matrix[block]
            stored = put(block, old).values
            _judge(stored, old, safe, place.name)
            ticker.add(stored.nbytes)


def _fold(tensor: _Tensor, bias: _Tensor | None, parts: Mapping[str, _Tensor] | None, ticker: Ticker, safe: bool,
          scratch: Scratch) -> TensorLoss:
    """Folds all adapters of one weight, and the bias that changes with it: in float32, rounded once.

    A weight whose stored rows are not output rows is folded whole; a stack of weights one after the other. ``parts`` are the tensors that
    a quantized one is written to.
    """
    target, place, coded = tensor.item.target, tensor.item.place, tensor.item.coded
    assert target is not None
    base, name = tensor.shard.checkpoint, target.weight
    info = base.tensors[name]
    dtype = work_dtype(info.dtype)
    before = None if target.bias is None or bias is None else bias.shard.base.read(target.bias).astype(dtype)
    after = None if before is None else np.empty_like(before)
    sums = LossSums()
    turned, step = LAYOUTS[target.kind].turned, 1 if coded is None else coded.weight.step
    source = plain_source(tensor.shard.base.path, info, dtype, scratch) if coded is None else coded_source(coded)
    sink = plain_sink(tensor.out, place, scratch) if coded is None or parts is None else coded_sink(
        coded, {role: (part.out, part.item.place) for role, part in parts.items()})
    with source as old_rows, sink as put:
        for number, matrix in enumerate(matrices_of(base, name, target.kind)):
            change = prepare([slice_of(each, number) for each in target.contributions], dtype, matrix, target.base_bias)
            rows, columns = matrix.shape
            for block in iter((slice(0, rows),)) if change.whole or turned else steps(rows, columns, step):
                count = block.stop - block.start
                shape = (columns, count) if turned else (count, columns)
                old = old_rows(block, shape)
                new, delta = scratch.get("new", shape, dtype), scratch.get("change", shape, dtype)
                lying = (old.T, delta.T, new.T) if turned else (old, delta, new)
                moved = change.apply(lying[0], None if before is None else before[block], block, lying[1], lying[2])
                if after is not None:
                    after[block] = moved
                written = put(block, new)
                sums.noise += written.noise
                _account(sums, (old, delta, new, written.values), safe, place.name)
                if parts:
                    ticker.check()
                else:
                    ticker.add(written.values.nbytes)
    if parts:
        ticker.add(sum(part.item.place.nbytes for part in parts.values()))
    if before is not None and after is not None and bias is not None:
        at = bias.item.place
        stored = after.astype(DTYPES[at.dtype])
        with opened(bias.out, os.O_WRONLY) as file:
            write_all(file, stored, at.offset)
        _account(sums, (before, after - before, after, stored), safe, at.name)
        ticker.add(stored.nbytes)
    return sums.loss(name, coded.weight.codec) if coded is not None and parts else sums.loss(place.name, place.dtype)


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
