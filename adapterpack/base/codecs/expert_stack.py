"""Reads and writes experts that a checkpoint stores one by one as the model's single stacked parameter."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np

from ...errors import Unsupported
from ...io.buffers import Scratch
from ...io.byte_ranges import open_descriptor, read_into
from ...io.safetensors import DTYPES
from ..checkpoint import Checkpoint
from ..fused_experts import ExpertStack
from ..rounding import Round
from .plain import widen, work_dtype
from .quantized_storage import QuantizedMatrix
from .storage import MAIN_PART, EncodedRows, PartUpdate, Read


class _Run(NamedTuple):
    """The rows of the stack, with all its matrices concatenated, that one stored tensor holds."""

    tensor: str
    start: int
    stop: int


def _runs(base: Checkpoint, stack: ExpertStack) -> list[_Run]:
    """Returns the rows that each stored tensor holds."""
    runs, at = [], 0
    for name in (name for parts in stack.parts for name in parts):
        rows = base.stored[name].shape[0]
        runs.append(_Run(name, at, at + rows))
        at += rows
    return runs


def _cut(runs: list[_Run], rows: slice) -> Iterator[tuple[int, slice, slice]]:
    """Yields, for each tensor that holds some of ``rows``: its number, these rows inside it, and the same
    rows relative to the start of ``rows``.
    """
    for number, run in enumerate(runs):
        first, last = max(rows.start, run.start), min(rows.stop, run.stop)
        if first < last:
            yield (
                number,
                slice(first - run.start, last - run.start),
                slice(first - rows.start, last - rows.start),
            )


class _Expert(QuantizedMatrix):
    """One matrix of a stack, read when rows are indexed."""

    def __init__(self, base: Checkpoint, names: tuple[str, ...], dtype: np.dtype[Any]) -> None:
        self.tensors = [base.view(name) for name in names]
        self.shape, self.dtype = (sum(len(part) for part in self.tensors), self.tensors[0].shape[1]), dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        blocks, at = [], 0
        for part in self.tensors:
            blocks.append(part[max(0, start - at) : max(0, stop - at)])
            at += len(part)
        return np.concatenate(blocks)


class StackReader(NamedTuple):
    """A :class:`~adapterpack.base.codecs.storage.Reader` of a stack."""

    base: Checkpoint
    stack: ExpertStack
    step: int = 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype."""
        return DTYPES[self.stack.dtype]

    @property
    def work(self) -> np.dtype[Any]:
        """float32, or float64 for float64."""
        return work_dtype(self.stack.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """The rows of all matrices together, and the columns."""
        count, rows, columns = self.stack.shape
        return count * rows, columns

    def matrices(self, kind: str) -> list[_Expert]:
        """Returns each expert's matrix, read when rows are indexed; raises for sites of other kinds than
        experts.
        """
        if kind != "experts":
            raise Unsupported(
                f"experts that are stored one by one are no weight of a site of kind '{kind}'",
                expected="experts",
                where=f"{self.base.folder}, {self.stack.name}",
                remedy="keep the adapter unmerged",
            )
        return [_Expert(self.base, names, DTYPES[self.stack.dtype]) for names in self.stack.parts]

    @contextmanager
    def opened(self) -> Iterator[Read]:
        """Opens the files of all experts; yields a function that reads a block of rows across them."""
        runs, dtype, width = _runs(self.base, self.stack), DTYPES[self.stack.dtype], self.stack.shape[2]
        with ExitStack() as files:
            paths = {self.base.source(run.tensor).path for run in runs}
            descriptors = {path: files.enter_context(open_descriptor(path, os.O_RDONLY)) for path in paths}

            def read(rows: slice, columns: int, scratch: Scratch) -> np.ndarray:
                raw = scratch.get("raw", (rows.stop - rows.start, columns), dtype)
                for number, in_tensor, in_block in _cut(runs, rows):
                    source = self.base.source(runs[number].tensor)
                    read_into(
                        descriptors[source.path],
                        raw[in_block],
                        source.ranges[0][0] + in_tensor.start * width * dtype.itemsize,
                    )
                return raw

            yield read

    def decode(self, raw: np.ndarray, scratch: Scratch) -> np.ndarray:
        """Converts stored rows to the working dtype."""
        return widen(raw, self.work, scratch, "old")


class StackWriter(NamedTuple):
    """A :class:`~adapterpack.base.codecs.storage.Writer` of a stack in the dtype ``out``, divided into the
    tensors of its experts.
    """

    base: Checkpoint
    stack: ExpertStack
    out: str
    stochastic: bool = True
    read_only_reason: str | None = None

    @property
    def label(self) -> str:
        """The dtype."""
        return self.out

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype."""
        return DTYPES[self.out]

    @property
    def parts(self) -> Mapping[str, str]:
        """The tensors of all experts."""
        return {_role(number): run.tensor for number, run in enumerate(_runs(self.base, self.stack))}

    def encode(self, values: np.ndarray, rows: slice, rounding: Round, scratch: Scratch) -> EncodedRows:
        """Rounds rows once and divides them into updates of the experts' tensors."""
        stored = rounding(values, DTYPES[self.out], scratch)
        updates = [
            PartUpdate(_role(number), in_tensor, stored[in_block])
            for number, in_tensor, in_block in _cut(_runs(self.base, self.stack), rows)
        ]
        return EncodedRows(updates, stored, stored.dtype.itemsize >= values.dtype.itemsize)

    def reread(self, raw: np.ndarray, work: np.dtype[Any], scratch: Scratch) -> np.ndarray:
        """Converts rows that were just stored to the working dtype."""
        return widen(raw, work, scratch, "old")

    def rest(self, role: str) -> np.ndarray:
        """Returns an empty part: a part without updates belongs to a stack without rows."""
        return np.empty(0, DTYPES[self.out])


def _role(number: int) -> str:
    """Returns the role of the tensor with this number."""
    return MAIN_PART if not number else f"expert part {number}"
