"""Reorders rows of weights that a file stores in another order than the model, as llama.cpp does with queries
and keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from ...io.buffers import Scratch
from ..rounding import Round
from .quantized_storage import QuantizedMatrix
from .storage import EncodedRows, Read, Reader, WeightStorage, Writer


def as_model(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns rows of the file in the model's order; ``order`` is, for each row of a run in the file, its row
    in the model's run.
    """
    runs = values.reshape(-1, len(order), *values.shape[1:])
    reordered = np.empty_like(runs)
    reordered[:, order] = runs
    return reordered.reshape(values.shape)


def as_file(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns rows of the model in the file's order; reverses :func:`as_model`.

    Example:
        >>> order = np.array([0, 2, 1, 3])
        >>> as_file(np.arange(8), order).tolist(), as_model(as_file(np.arange(8), order), order).tolist()
        ([0, 2, 1, 3, 4, 6, 5, 7], [0, 1, 2, 3, 4, 5, 6, 7])
    """
    return values.reshape(-1, len(order), *values.shape[1:])[:, order].reshape(values.shape)


class OrderedMatrix(QuantizedMatrix):
    """A matrix ``[out, in]`` in the model's order of rows, reordered when rows are indexed."""

    def __init__(self, inner: Any, order: np.ndarray) -> None:
        self.inner, self.order, self.shape, self.dtype = inner, order, inner.shape, inner.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        run = len(self.order)
        first, last = start // run * run, -(-stop // run) * run
        return as_model(np.asarray(self.inner[first:last]), self.order)[start - first : stop - first]


class OrderedReader(NamedTuple):
    """A reader that reorders the rows of another one into the model's order when decoding."""

    inner: Reader
    order: np.ndarray

    @property
    def work(self) -> np.dtype[Any]:
        """The inner reader's dtype."""
        return self.inner.work

    @property
    def step(self) -> int:
        """The length of a run, so that blocks contain complete runs; the inner reader's blocks may begin
        anywhere.
        """
        return len(self.order)

    @property
    def shape(self) -> tuple[int, int]:
        """The inner reader's shape."""
        return self.inner.shape

    def matrices(self, kind: str) -> Sequence[OrderedMatrix]:
        """Returns the inner reader's matrices in the model's order."""
        return [OrderedMatrix(matrix, self.order) for matrix in self.inner.matrices(kind)]

    def opened(self) -> AbstractContextManager[Read]:
        """Opens the inner reader; raw blocks are in the file's order."""
        return self.inner.opened()

    def decode(self, raw: np.ndarray, scratch: Scratch) -> np.ndarray:
        """Decodes rows and reorders them into the model's order."""
        return as_model(self.inner.decode(raw, scratch), self.order)


class OrderedWriter(NamedTuple):
    """A writer that passes rows on to another one in the file's order."""

    inner: Writer
    order: np.ndarray

    @property
    def label(self) -> str:
        """The inner writer's label."""
        return self.inner.label

    @property
    def parts(self) -> Mapping[str, str]:
        """The inner writer's parts."""
        return self.inner.parts

    @property
    def stochastic(self) -> bool:
        """Whether the inner writer can round stochastically."""
        return self.inner.stochastic

    @property
    def read_only_reason(self) -> str | None:
        """The inner writer's reason."""
        return self.inner.read_only_reason

    def encode(self, values: np.ndarray, rows: slice, rounding: Round, scratch: Scratch) -> EncodedRows:
        """Reorders rows into the file's order and encodes them."""
        return self.inner.encode(as_file(values, self.order), rows, rounding, scratch)

    def reread(self, raw: np.ndarray, work: np.dtype[Any], scratch: Scratch) -> np.ndarray:
        """Decodes rows that were just stored, in the model's order."""
        return as_model(self.inner.reread(raw, work, scratch), self.order)

    def rest(self, role: str) -> np.ndarray:
        """Returns a part as the inner writer does."""
        return self.inner.rest(role)


def reorder_rows(storage: WeightStorage, order: np.ndarray | None) -> WeightStorage:
    """Returns the same storage with its rows in the model's order."""
    return (
        storage
        if order is None
        else WeightStorage(OrderedReader(storage.reader, order), OrderedWriter(storage.writer, order))
    )
