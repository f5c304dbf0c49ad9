"""A weight whose file holds the rows of each run in another order than the model, as llama.cpp does with queries and keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from ...io.buffers import Scratch
from ..rounding import Round
from .quantized_storage import Matrix
from .storage import Encoded, Read, Reader, Storage, Writer


def as_model(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rows of the file in the model's order; ``order`` says for each row of a run in the file its row in the model's run."""
    runs = values.reshape(-1, len(order), *values.shape[1:])
    found = np.empty_like(runs)
    found[:, order] = runs
    return found.reshape(values.shape)


def as_file(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The reverse of :func:`as_model`.

    Example:
        >>> order = np.array([0, 2, 1, 3])
        >>> as_file(np.arange(8), order).tolist(), as_model(as_file(np.arange(8), order), order).tolist()
        ([0, 2, 1, 3, 4, 6, 5, 7], [0, 1, 2, 3, 4, 5, 6, 7])
    """
    return values.reshape(-1, len(order), *values.shape[1:])[:, order].reshape(values.shape)


class OrderedMatrix(Matrix):
    """A matrix ``[out, in]`` in the model's order, put in order where it is looked at."""

    def __init__(self, inner: Any, order: np.ndarray) -> None:
        self.inner, self.order, self.shape, self.dtype = inner, order, inner.shape, inner.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        run = len(self.order)
        first, last = start // run * run, -(-stop // run) * run
        return as_model(np.asarray(self.inner[first:last]), self.order)[start - first : stop - first]


class OrderedReader(NamedTuple):
    """Another reader whose rows are put in the model's order as they are decoded."""

    inner: Reader
    order: np.ndarray

    @property
    def work(self) -> np.dtype[Any]:
        """The other's."""
        return self.inner.work

    @property
    def step(self) -> int:
        """Whole runs; the other's rows may begin anywhere."""
        return len(self.order)

    @property
    def shape(self) -> tuple[int, int]:
        """The other's."""
        return self.inner.shape

    def matrices(self, kind: str) -> Sequence[OrderedMatrix]:
        """See the protocol."""
        return [OrderedMatrix(matrix, self.order) for matrix in self.inner.matrices(kind)]

    def opened(self) -> AbstractContextManager[Read]:
        """The other's: what is raw lies as in the file."""
        return self.inner.opened()

    def decode(self, raw: np.ndarray, scratch: Scratch) -> np.ndarray:
        """See the protocol."""
        return as_model(self.inner.decode(raw, scratch), self.order)


class OrderedWriter(NamedTuple):
    """Another writer that is given rows in the file's order."""

    inner: Writer
    order: np.ndarray

    @property
    def label(self) -> str:
        """The other's."""
        return self.inner.label

    @property
    def parts(self) -> Mapping[str, str]:
        """The other's."""
        return self.inner.parts

    @property
    def by_chance(self) -> bool:
        """The other's."""
        return self.inner.by_chance

    @property
    def sealed(self) -> str | None:
        """The other's."""
        return self.inner.sealed

    def encode(self, values: np.ndarray, rows: slice, rounding: Round, scratch: Scratch) -> Encoded:
        """See the protocol."""
        return self.inner.encode(as_file(values, self.order), rows, rounding, scratch)

    def reread(self, raw: np.ndarray, work: np.dtype[Any], scratch: Scratch) -> np.ndarray:
        """See the protocol."""
        return as_model(self.inner.reread(raw, work, scratch), self.order)

    def rest(self, role: str) -> np.ndarray:
        """The other's."""
        return self.inner.rest(role)


def ordered(storage: Storage, order: np.ndarray | None) -> Storage:
    """The same storage seen in the model's order of rows."""
    return storage if order is None else Storage(OrderedReader(storage.reader, order), OrderedWriter(storage.writer, order))
