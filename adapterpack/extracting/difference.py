"""Computes the difference of a matrix in two checkpoints in blocks of rows, and estimates how much of it is
rounding.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..adapter_methods import row_blocks
from ..base.checkpoint import Checkpoint
from ..errors import storage_errors
from ..io.byte_ranges import open_descriptor, read_into
from ..io.safetensors import DTYPES

_BLOCK = 1 << 20
"""The size of a block: 4 MB in float32."""
_MAX_CACHED = 64 << 20
"""A difference of at most this many numbers (256 MB) is kept in memory rather than read again for every
pass.
"""
_BITS = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E5M2": 2}
"""Stored bits of the significand of each dtype."""
_ARITHMETIC = 2e-7
"""The error of subtraction and products in float32, relative to the norm of the difference."""


class TensorPair(NamedTuple):
    """A tensor in both checkpoints, by its name in each."""

    tuned: Checkpoint
    base: Checkpoint
    name: str
    base_name: str

    @property
    def nbytes(self) -> int:
        """The bytes of the tuned tensor."""
        return self.tuned.tensors[self.name].nbytes

    def same(self) -> bool:
        """Whether both have the same bytes; reads blocks up to the first difference."""
        tuned, base = self.tuned.tensors[self.name], self.base.tensors[self.base_name]
        if (tuned.dtype, tuned.shape) != (base.dtype, base.shape):
            return False
        return all(
            a.tobytes() == b.tobytes() for _, a, b in _read(self, rows=(max(1, tuned.nbytes), 1), raw=True)
        )


def _read(
    pair: TensorPair, rows: tuple[int, int], raw: bool = False
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Blocks of rows of a ``[m, n]`` tensor from both files, in their dtypes or as bytes."""
    tuned, base = pair.tuned.tensors[pair.name], pair.base.tensors[pair.base_name]
    types = (np.dtype(np.uint8),) * 2 if raw else (DTYPES[tuned.dtype], DTYPES[base.dtype])
    files = pair.tuned.source(pair.name).path, pair.base.source(pair.base_name).path
    total = tuned.nbytes if raw else None
    m, n = (total or 0, 1) if raw else rows
    with (
        storage_errors(f"{files[0]} or {files[1]}"),
        open_descriptor(files[0], os.O_RDONLY) as first,
        open_descriptor(files[1], os.O_RDONLY) as second,
    ):
        for block in row_blocks(m, n, _BLOCK):
            shape = (block.stop - block.start, n)
            read = np.empty(shape, types[0]), np.empty(shape, types[1])
            read_into(first, read[0], tuned.offset + block.start * n * types[0].itemsize)
            read_into(second, read[1], base.offset + block.start * n * types[1].itemsize)
            yield block, *read


class WeightDifference:
    """``tuned - base`` of a stored matrix, as input of the range finder: float32, or float64 if both are.

    ``noise`` is the part of ``||D||_F^2`` that is expected of rounding the tuned matrix to its dtype: the sum
    of ``ulp^2 / 12`` over all entries, and the error of float32 arithmetic. ``unevenness`` is how much larger
    the largest singular value of the rounding may be than if rounding had the same size everywhere: the norm
    of a random matrix is about that of its largest row and its largest column together (Bandeira and van
    Handel 2016).
    """

    def __init__(self, pair: TensorPair) -> None:
        self.pair = pair
        self.shape: tuple[int, int] = pair.tuned.tensors[pair.name].shape  # type: ignore[assignment]
        wide = {pair.tuned.tensors[pair.name].dtype, pair.base.tensors[pair.base_name].dtype} == {"F64"}
        self.dtype = np.dtype(np.float64 if wide else np.float32)
        self.bits = _BITS[pair.tuned.tensors[pair.name].dtype]
        self._cached: np.ndarray | None = None
        self.noise, self.total, self.finite = 0.0, 0.0, True
        by_row, by_column = np.zeros(self.shape[0]), np.zeros(self.shape[1])
        cached = np.empty(self.shape, self.dtype) if self.shape[0] * self.shape[1] <= _MAX_CACHED else None
        for rows, difference, tuned in self._fresh():
            self.total += float(np.sum(np.vecdot(difference, difference), dtype=np.float64))
            powers = self._powers(tuned)
            by_row[rows] = np.vecdot(powers, powers)
            by_column += np.einsum("ij,ij->j", powers, powers)
            if cached is not None:
                cached[rows] = difference
        self.finite = bool(np.isfinite(self.total))
        unit = 2.0 ** (-2 * self.bits) / 12
        self.noise = float(by_row.sum()) * unit
        even = math.sqrt(1 / self.shape[0]) + math.sqrt(1 / self.shape[1])
        uneven = math.sqrt(by_row.max()) + math.sqrt(by_column.max())
        self.unevenness = max(1.0, uneven / (even * math.sqrt(by_row.sum()))) if self.noise else 1.0
        self.noise += (_ARITHMETIC**2 if self.dtype == np.float32 else 0.0) * self.total
        self._cached = cached

    @property
    def guess(self) -> None:
        """Returns None: no subspace is known in advance."""

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields the rows of the difference in blocks, each with its row slice."""
        if self._cached is not None:
            for rows in row_blocks(*self.shape, _BLOCK):
                yield rows, self._cached[rows]
        else:
            for rows, difference, _ in self._fresh():
                yield rows, difference

    def _fresh(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        for rows, tuned, base in _read(self.pair, self.shape):
            wide = tuned.astype(self.dtype)
            yield rows, wide - base.astype(self.dtype), wide

    def _powers(self, tuned: np.ndarray) -> np.ndarray:
        """Returns the power of two of every number (the exponent bits alone), and 0 for 0."""
        if self.dtype == np.float64:
            return (tuned.view(np.uint64) & np.uint64(0x7FF << 52)).view(self.dtype)
        return (tuned.view(np.uint32) & np.uint32(0xFF << 23)).view(self.dtype)
