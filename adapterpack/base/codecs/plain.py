"""Reads and writes weights that are stored unquantized, in a floating dtype."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from ...adapter_methods import is_stacked, to_matrix
from ...io.buffers import Scratch
from ...io.byte_ranges import open_descriptor, read_into
from ...io.safetensors import DTYPES, TensorInfo
from ..checkpoint import Checkpoint
from ..rounding import Round
from .storage import MAIN_PART, EncodedRows, PartUpdate, Read


class PlainReader(NamedTuple):
    """A :class:`~adapterpack.base.codecs.storage.Reader` of the tensor ``name`` of ``base``."""

    base: Checkpoint
    name: str
    step: int = 1

    @property
    def info(self) -> TensorInfo:
        """The tensor's dtype, shape and position in the file."""
        return self.base.tensors[self.name]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype."""
        return DTYPES[self.info.dtype]

    @property
    def work(self) -> np.dtype[Any]:
        """float32, or float64 for float64."""
        return work_dtype(self.info.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """The elements as one column."""
        return math.prod(self.info.shape), 1

    def matrices(self, kind: str) -> list[np.ndarray]:
        """Returns the matrices of the weight, as views of the mapped file."""
        weight = to_matrix(kind, self.base.view(self.name))
        return list(weight) if is_stacked(kind) else [weight]

    @contextmanager
    def opened(self) -> Iterator[Read]:
        """Opens the file; yields a function that reads a block of rows."""
        info = self.info
        dtype = DTYPES[info.dtype]
        with open_descriptor(self.base.source(self.name).path, os.O_RDONLY) as descriptor:

            def read(rows: slice, columns: int, scratch: Scratch) -> np.ndarray:
                raw = scratch.get("raw", (rows.stop - rows.start, columns), dtype)
                read_into(descriptor, raw, info.offset + rows.start * columns * dtype.itemsize)
                return raw

            yield read

    def decode(self, raw: np.ndarray, scratch: Scratch) -> np.ndarray:
        """Converts stored rows to the working dtype."""
        return widen(raw, self.work, scratch, "old")


class PlainWriter(NamedTuple):
    """A :class:`~adapterpack.base.codecs.storage.Writer` of the tensor ``name`` in the dtype ``out``."""

    name: str
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
        """The tensor itself."""
        return {MAIN_PART: self.name}

    def encode(self, values: np.ndarray, rows: slice, rounding: Round, scratch: Scratch) -> EncodedRows:
        """Rounds rows once, to the output's dtype."""
        stored = rounding(values, DTYPES[self.out], scratch)
        return EncodedRows(
            (PartUpdate(MAIN_PART, rows, stored),), stored, stored.dtype.itemsize >= values.dtype.itemsize
        )

    def reread(self, raw: np.ndarray, work: np.dtype[Any], scratch: Scratch) -> np.ndarray:
        """Converts rows that were just stored to the working dtype."""
        return widen(raw, work, scratch, "old")

    def rest(self, role: str) -> np.ndarray:
        """Returns an empty part: a part without updates belongs to a weight without rows."""
        return np.empty(0, DTYPES[self.out])


def work_dtype(dtype: str) -> np.dtype[Any]:
    """Returns the dtype for computing changes to a tensor of this safetensors dtype: float32, or float64 for
    float64.
    """
    return np.dtype(np.float64 if dtype == "F64" else np.float32)


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
