"""Computes the difference of a matrix in two checkpoints in blocks of rows, and estimates how much of it is
rounding.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..adapter_methods import row_blocks
from ..base import Checkpoint
from ..errors import storage_errors
from ..io import DTYPES, TensorInfo, open_descriptor, read_into

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
    def infos(self) -> tuple[TensorInfo, TensorInfo]:
        """What the tuned checkpoint and the base say of the tensor."""
        return self.tuned.tensors[self.name], self.base.tensors[self.base_name]

    def same(self) -> bool:
        """Whether both have the same bytes; reads blocks up to the first difference."""
        tuned, base = self.infos
        if (tuned.dtype, tuned.shape) != (base.dtype, base.shape):
            return False
        byte = np.dtype(np.uint8)
        return all(a.tobytes() == b.tobytes() for _, a, b in _read(self, (tuned.nbytes, 1), (byte, byte)))


def _read(
    pair: TensorPair, shape: tuple[int, int], types: tuple[np.dtype[Any], np.dtype[Any]]
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yields the rows of a ``[m, n]`` tensor in blocks, from both files, as numbers of these types."""
    tuned, base = pair.infos
    files = (pair.tuned.source(pair.name).path, pair.base.source(pair.base_name).path)
    m, n = shape
    with (
        storage_errors(f"{files[0]} or {files[1]}"),
        open_descriptor(files[0], os.O_RDONLY) as first,
        open_descriptor(files[1], os.O_RDONLY) as second,
    ):
        for block in row_blocks(m, n, _BLOCK):
            read = tuple(np.empty((block.stop - block.start, n), dtype) for dtype in types)
            read_into(first, read[0], tuned.offset + block.start * n * types[0].itemsize)
            read_into(second, read[1], base.offset + block.start * n * types[1].itemsize)
            yield block, read[0], read[1]


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
        stored, base = pair.infos
        self.shape: tuple[int, int] = stored.shape  # type: ignore[assignment]
        wide = {stored.dtype, base.dtype} == {"F64"}
        self.dtype = np.dtype(np.float64 if wide else np.float32)
        self.bits = _BITS[stored.dtype]
        self._cached: np.ndarray | None = None
        self.noise = 0.0
        self.total = 0.0
        self.finite = True
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
        stored, of_base = self.pair.infos
        types = DTYPES[stored.dtype], DTYPES[of_base.dtype]
        for rows, tuned, base in _read(self.pair, self.shape, types):
            wide = tuned.astype(self.dtype)
            yield rows, wide - base.astype(self.dtype), wide

    def _powers(self, tuned: np.ndarray) -> np.ndarray:
        """Returns the power of two of every number (the exponent bits alone), and 0 for 0."""
        if self.dtype == np.float64:
            return (tuned.view(np.uint64) & np.uint64(0x7FF << 52)).view(self.dtype)
        return (tuned.view(np.uint32) & np.uint32(0xFF << 23)).view(self.dtype)
