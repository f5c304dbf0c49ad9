"""Reads and writes weights that are stored unquantized, in a floating dtype: as one tensor, or as the tensors
of the experts of a stack.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np

from ...adapter_methods import is_stacked, to_matrix
from ...errors import Unsupported
from ...io import DTYPES, Scratch, open_descriptor, read_into
from .. import Checkpoint, Round
from ..fused_experts import ExpertStack
from .storage import MAIN_PART, EncodedRows, LazyMatrix, PartUpdate, Read, Reader, WeightStorage, Writer


class _Run(NamedTuple):
    """The rows of a weight, with all its matrices concatenated, that the tensor with this role holds."""

    role: str
    tensor: str
    start: int
    stop: int


def _cut(runs: Sequence[_Run], rows: slice) -> Iterator[tuple[_Run, slice, slice]]:
    """Yields each run that holds some of ``rows``, with these rows inside it and relative to the start of
    ``rows``.
    """
    for run in runs:
        first = max(rows.start, run.start)
        last = min(rows.stop, run.stop)
        if first < last:
            yield (
                run,
                slice(first - run.start, last - run.start),
                slice(first - rows.start, last - rows.start),
            )


def plain_storage(base: Checkpoint, name: str, out: str) -> WeightStorage:
    """Returns the storage of the tensor ``name`` of ``base``, in its own dtype and in ``out``."""
    info = base.tensors[name]

    def matrices(kind: str) -> list[np.ndarray]:
        """Returns the matrices of the weight, as views of the mapped file."""
        weight = to_matrix(kind, base.view(name))
        return list(weight) if is_stacked(kind) else [weight]

    reader = _reader(base, _whole(name), info.dtype, (math.prod(info.shape), 1), matrices)
    return WeightStorage(reader, plain_writer(name, out))


def plain_writer(name: str, out: str) -> Writer:
    """Returns the writer of the tensor ``name`` in the dtype ``out``."""
    return _writer(_whole(name), out)


def _whole(name: str) -> list[_Run]:
    return [_Run(MAIN_PART, name, 0, sys.maxsize)]


def stack_storage(base: Checkpoint, stack: ExpertStack, out: str) -> WeightStorage:
    """Returns the storage of experts that a checkpoint stores one by one, and the model as a single stacked
    parameter.
    """
    runs = []
    at = 0
    for number, name in enumerate(name for names in stack.parts for name in names):
        rows = base.stored[name].shape[0]
        runs.append(_Run(f"expert part {number}" if number else MAIN_PART, name, at, at + rows))
        at += rows
    count, rows, columns = stack.shape

    def expert(names: Sequence[str]) -> LazyMatrix:
        tensors = [base.view(name) for name in names]

        def read(start: int, stop: int) -> np.ndarray:
            blocks = []
            at = 0
            for part in tensors:
                blocks.append(part[max(0, start - at) : max(0, stop - at)])
                at += len(part)
            return np.concatenate(blocks)

        return LazyMatrix((rows, columns), DTYPES[stack.dtype], read)

    def matrices(kind: str) -> list[LazyMatrix]:
        """Returns each expert's matrix; raises for sites of other kinds than experts."""
        if kind != "experts":
            raise Unsupported(
                f"experts that are stored one by one are no weight of a site of kind '{kind}'",
                expected="experts",
                where=f"{base.folder}, {stack.name}",
                remedy="keep the adapter unmerged",
            )
        return [expert(names) for names in stack.parts]

    return WeightStorage(
        _reader(base, runs, stack.dtype, (count * rows, columns), matrices), _writer(runs, out)
    )


def _reader(
    base: Checkpoint,
    runs: Sequence[_Run],
    name: str,
    shape: tuple[int, int],
    matrices: Callable[[str], Sequence[Any]],
) -> Reader:
    """Returns the reader of a weight of the safetensors dtype ``name``."""
    dtype = DTYPES[name]
    work = np.dtype(np.float64 if name == "F64" else np.float32)

    @contextmanager
    def opened() -> Iterator[Read]:
        """Opens the files of all runs; yields a function that reads a block of rows across them."""
        sources = {run.tensor: base.source(run.tensor) for run in runs}
        with ExitStack() as files:
            descriptors = {
                path: files.enter_context(open_descriptor(path, os.O_RDONLY))
                for path in {source.path for source in sources.values()}
            }

            def read(rows: slice, columns: int, scratch: Scratch) -> np.ndarray:
                raw = scratch.get("raw", (rows.stop - rows.start, columns), dtype)
                for run, in_run, in_block in _cut(runs, rows):
                    source = sources[run.tensor]
                    start = source.ranges[0][0] + in_run.start * columns * dtype.itemsize
                    read_into(descriptors[source.path], raw[in_block], start)
                return raw

            yield read

    return Reader(
        work, shape, matrices, opened, lambda raw, scratch: widen(raw, work, scratch, "old"), plain=dtype
    )


def _writer(runs: Sequence[_Run], out: str) -> Writer:
    """Returns the writer that rounds rows once, to the dtype ``out``, and divides them among the runs."""

    def encode(values: np.ndarray, rows: slice, rounding: Round, scratch: Scratch) -> EncodedRows:
        stored = rounding(values, DTYPES[out], scratch)
        updates = [
            PartUpdate(run.role, in_run, stored[in_block]) for run, in_run, in_block in _cut(runs, rows)
        ]
        return EncodedRows(updates, stored, stored.dtype.itemsize >= values.dtype.itemsize)

    return Writer(
        out,
        {run.role: run.tensor for run in runs},
        encode,
        lambda raw, work, scratch: widen(raw, work, scratch, "old"),
        stochastic=True,
        plain=DTYPES[out],
    )


_TABLES: dict[np.dtype[Any], np.ndarray] = {}


def widen(value: np.ndarray, dtype: np.dtype[Any], scratch: Scratch, name: str) -> np.ndarray:
    """Returns ``value`` itself if it has that dtype, else an exact copy in the scratch buffer ``name``.

    float16 and float8 are converted through a table of all their values: numpy's own conversion, element by
    element, is many times slower.
    """
    if value.dtype == dtype:
        return value
    out = scratch.get(name, value.shape, dtype)
    if dtype == np.float32 and value.dtype.itemsize <= 2 and value.dtype != DTYPES["BF16"]:
        np.take(
            levels_of(value.dtype),
            value.view(np.uint8 if value.dtype.itemsize == 1 else np.uint16),
            out=out,
            mode="clip",
        )
    else:
        np.copyto(out, value, casting="unsafe")
    return out


def levels_of(dtype: np.dtype[Any]) -> np.ndarray:
    """Returns all values of a dtype of at most two bytes as float32, indexed by their bits."""
    if dtype not in _TABLES:
        codes = np.arange(1 << 8 * dtype.itemsize, dtype=np.uint8 if dtype.itemsize == 1 else np.uint16)
        _TABLES[dtype] = codes.view(dtype).astype(np.float32)
    return _TABLES[dtype]
