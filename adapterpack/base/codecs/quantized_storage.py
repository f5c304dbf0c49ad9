"""Reads and writes the weights of quantized checkpoints block by block, through the codec of their format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from ...adapter_methods import LAYOUTS
from ...errors import NonFinite, Unsupported
from ...io.buffers import Scratch
from ..rounding import Round
from .base import Parts, Weight
from .grid import F32, Rows
from .storage import EncodedRows, Read

_BLOCK = 1 << 20


class QuantizedMatrix:
    """A weight ``[out, in]`` that is decoded to float32 when rows are indexed."""

    dtype: np.dtype[Any] = F32
    ndim = 2

    def __init__(self, weight: Weight, parts: Parts) -> None:
        self.weight, self.parts, self.shape = weight, parts, weight.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Rows:
        start, stop, _ = rows.indices(self.shape[0])
        step = self.weight.step
        first, last = start // step * step, min(self.shape[0], -(-stop // step) * step)
        return self.weight.decode(self.parts, slice(first, last))[start - first : stop - first]

    def astype(self, dtype: Any, copy: bool = True) -> Rows:
        """Decodes the whole matrix."""
        return self[0 : self.shape[0]].astype(dtype, copy=copy)


class Transposed(QuantizedMatrix):
    """The transpose of a lazily decoded matrix, such as an embedding; decodes blocks of the stored rows."""

    def __init__(self, inner: QuantizedMatrix) -> None:
        self.inner, self.shape = inner, inner.shape[::-1]

    def __getitem__(self, rows: slice) -> Rows:
        count, width = self.inner.shape
        step = max(1, _BLOCK // max(1, width))
        return np.concatenate(
            [self.inner[start : min(count, start + step)][:, rows] for start in range(0, count, step)]
        ).T


class QuantizedReader(NamedTuple):
    """A :class:`~adapterpack.base.codecs.storage.Reader` of a quantized weight; its raw blocks are already
    decoded.
    """

    matrix: QuantizedMatrix
    where: str

    @property
    def work(self) -> np.dtype[Any]:
        """float32."""
        return self.matrix.dtype

    @property
    def step(self) -> int:
        """The weight's step."""
        return self.matrix.weight.step

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's shape."""
        return self.matrix.shape

    def matrices(self, kind: str) -> list[QuantizedMatrix]:
        """Returns the matrix, decoded when rows are indexed; raises for sites whose weight is not a
        matrix.
        """
        layout = LAYOUTS[kind]
        if layout.stacked or 2 not in layout.axes:
            raise Unsupported(
                f"a quantized weight is a matrix, and this site is of kind '{kind}'",
                expected="linear",
                where=self.where,
                found=self.matrix.weight.codec,
                remedy=(
                    "merge into the original checkpoint and quantize the result, or keep the adapter unmerged"
                ),
            )
        return [Transposed(self.matrix) if layout.turned else self.matrix]

    @contextmanager
    def opened(self) -> Iterator[Read]:
        """Yields a function that decodes a block of rows."""
        yield lambda rows, columns, scratch: self.matrix[rows]

    def decode(self, raw: np.ndarray, scratch: Scratch) -> np.ndarray:
        """Returns the block unchanged: it is decoded already."""
        return raw


class QuantizedWriter(NamedTuple):
    """A :class:`~adapterpack.base.codecs.storage.Writer` of a quantized weight, requantized in its own
    format.
    """

    matrix: QuantizedMatrix
    stochastic: bool = False

    @property
    def label(self) -> str:
        """The name of the format."""
        return self.matrix.weight.codec

    @property
    def parts(self) -> Mapping[str, str]:
        """The weight's parts."""
        return self.matrix.weight.parts

    @property
    def read_only_reason(self) -> str | None:
        """The weight's reason."""
        return self.matrix.weight.read_only_reason

    def encode(self, values: np.ndarray, rows: slice, rounding: Round, scratch: Scratch) -> EncodedRows:
        """Requantizes rows to the codes with the least error."""
        if not np.isfinite(values).all():
            raise NonFinite(
                f"the merged tensor holds NaN or infinity, which {self.label} cannot hold",
                where=self.matrix.weight.name,
                remedy=(
                    "merge with dtype float32; if that does not help, the base or the adapter holds it "
                    "already"
                ),
            )
        updates, after, noise = self.matrix.weight.encode(self.matrix.parts, rows, values)
        return EncodedRows(updates, after, False, noise)

    def reread(self, raw: np.ndarray, work: np.dtype[Any], scratch: Scratch) -> np.ndarray:
        """Returns the block unchanged: encoding has decoded it already."""
        return raw

    def rest(self, role: str) -> np.ndarray:
        """Returns a part as the base stores it."""
        return self.matrix.parts[role]
