"""Describes how formats of scaled integers store a weight: in which order and how many bits its codes, scales
and zero points are, and which of them share a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .base import ModuleTensors, Parts, Weight
from .grid import Grid, QuantizedRows, Rows, ScaleRows
from .storage import PartUpdate


class PartLayout(NamedTuple):
    """How a part stores a matrix of numbers, with one row for each ``height`` rows of the weight.

    Attributes:
        height: rows of the weight that share a row of numbers.
        turned: whether the transpose is stored.
        bits: numbers are packed in 32-bit words; None: each number is an element.
        columns: the length of a row, if words hold numbers of a row; None: they hold numbers of neighbouring
            rows.
        added: what reading adds to packed numbers; a sum too large for ``bits`` starts again at zero.
        order: position ``i`` of a word holds its ``order[i]``-th number.
    """

    height: int = 1
    turned: bool = False
    bits: int | None = None
    columns: int | None = None
    added: int = 0
    order: np.ndarray | None = None

    def read(self, part: np.ndarray, rows: slice) -> np.ndarray:
        """Returns the numbers of ``rows`` of the weight."""
        matrix = part if part.ndim == 2 else part.reshape(-1, 1)
        stored = (matrix.T if self.turned else matrix)[self._lines(rows)]
        if self.bits is None:
            return stored
        if self.columns is not None:
            numbers = unpack(stored, self.bits, self.columns)
        else:
            numbers = unpack(stored.T, self.bits, rows.stop - rows.start)
            if self.order is not None:
                numbers = _permute(numbers, np.argsort(self.order))
            numbers = np.ascontiguousarray(numbers.T)
        if not self.added:
            return numbers
        moved = numbers.astype(np.int16) + self.added
        return moved.astype(np.int8) if self.added < 0 else (moved & (1 << self.bits) - 1).astype(np.uint8)

    def write(self, role: str, part: np.ndarray, rows: slice, numbers: np.ndarray) -> PartUpdate:
        """Returns the update that stores the numbers of ``rows``."""
        if self.bits is None:
            stored = numbers.astype(part.dtype, copy=False)
        else:
            moved = numbers.astype(np.int16) - self.added & (1 << self.bits) - 1
            if self.columns is not None:
                stored = pack(moved, self.bits)
            else:
                turned = moved.T if self.order is None else _permute(moved.T, self.order)
                stored = pack(turned, self.bits).T
        lines = self._lines(rows)
        if self.turned:
            return PartUpdate(role, slice(0, len(part)), stored.T, lines)
        return PartUpdate(role, lines, stored)

    def _lines(self, rows: slice) -> slice:
        """Returns the stored rows, or words, that hold the numbers of these rows."""
        if self.bits is not None and self.columns is None:
            return slice(rows.start * self.bits // 32, -(-rows.stop * self.bits // 32))
        return slice(rows.start // self.height, -(-rows.stop // self.height))


class CodeLayout(NamedTuple):
    """How the codes, scales and zero points of a weight are stored, in the parts ``codes``, ``scale`` and
    ``zero``; the last may be absent.
    """

    codes: PartLayout = PartLayout()
    scale: PartLayout = PartLayout()
    zero: PartLayout = PartLayout()

    def weight(
        self,
        module: ModuleTensors,
        shape: tuple[int, int],
        dtype: str,
        parts: Mapping[str, str],
        grid: Grid,
        step: int = 1,
    ) -> Weight:
        """Returns the weight of a module that is stored in this way."""
        return Weight(
            module.codec,
            f"{module.path}.weight",
            shape,
            dtype,
            parts,
            grid,
            self.unpack,
            self.pack,
            self.round_scales,
            step,
        )

    def unpack(self, parts: Parts, rows: slice) -> QuantizedRows:
        """Reads the codes, scales and zero points of rows."""
        zero = self.zero.read(parts["zero"], rows).astype(np.float32) if "zero" in parts else None
        scale = self.scale.read(parts["scale"], rows).astype(np.float32)
        return QuantizedRows(self.codes.read(parts["codes"], rows), scale, zero)

    def pack(self, parts: Parts, rows: slice, quantized: QuantizedRows) -> list[PartUpdate]:
        """Returns the updates that store quantized rows."""
        numbers = {"codes": quantized.codes, "scale": quantized.scale, "zero": quantized.zero}
        return [
            getattr(self, role).write(role, parts[role], rows, values)
            for role, values in numbers.items()
            if values is not None
        ]

    def round_scales(self, parts: Parts, rows: slice, scale: Rows, zero: Rows | None) -> ScaleRows:
        """Rounds scales to the dtype in which they are stored."""
        return scale.astype(parts["scale"].dtype).astype(np.float32), zero


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Returns the first ``count`` integers of each row of ``words`` ``[n, m]`` (int32 or uint32), lowest bits
    first, as uint8 ``[n, count]``.

    With 3 bits, integers straddle word boundaries.

    Example:
        >>> unpack(np.array([[0x21]], np.uint32), 4, 3).tolist()
        [[1, 2, 0]]
    """
    words = np.ascontiguousarray(words).view(np.uint32)
    period, stride = _cycle(bits)
    mask = np.uint32((1 << bits) - 1)
    values = np.empty((len(words), words.shape[1] // stride * period), np.uint8)
    for at in range(period):
        word, shift = divmod(at * bits, 32)
        field = words[:, word::stride] >> np.uint32(shift)
        if shift + bits > 32:
            field = field | words[:, word + 1 :: stride] << np.uint32(32 - shift)
        values[:, at::period] = field & mask
    return values[:, :count]


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Returns words ``[n, ceil(count * bits / 32)]`` (int32) from integers ``[n, count]`` that fit into
    ``bits``; unused bits of the last word are zero.

    Example:
        >>> pack(np.array([[1, 2, 0]]), 4).tolist()
        [[33]]
    """
    period, stride = _cycle(bits)
    cycles = -(-values.shape[1] // period)
    padded = np.zeros((len(values), cycles * period), np.uint32)
    padded[:, : values.shape[1]] = values
    words = np.zeros((len(values), cycles * stride), np.uint32)
    for at in range(period):
        word, shift = divmod(at * bits, 32)
        words[:, word::stride] |= padded[:, at::period] << np.uint32(shift)
        if shift + bits > 32:
            words[:, word + 1 :: stride] |= padded[:, at::period] >> np.uint32(32 - shift)
    return words.view(np.int32)


def _cycle(bits: int) -> tuple[int, int]:
    """Returns how many integers fill how many words completely."""
    whole = math.lcm(bits, 32)
    return whole // bits, whole // 32


def _permute(numbers: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Reorders every run of ``len(order)`` numbers of a row."""
    return numbers.reshape(len(numbers), -1, len(order))[:, :, order].reshape(len(numbers), -1)
