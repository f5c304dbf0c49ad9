"""Reads and writes llama.cpp's quantized blocks (GGUF): runs of a row that share float16 scales or, in the K
types, small multiples of one.

The layouts follow ggml's ``ggml-common.h``. Every type here is a grid ``scale * code`` or ``scale * code +
minimum``, described by a value: the fields of its block, and in which bits of them its codes and scales are.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..codecs.base import Parts, Weight
from ..codecs.grid import F32, Grid, Groups, Levels, QuantizedRows, Rows, ScaleRows, integers
from ..codecs.storage import PartUpdate
from .tensor_types import TENSOR_TYPES, TYPE_NUMBERS

Blocks = np.ndarray
"""An array ``[n, blocks per row]`` of one type's structure."""


class Bits(NamedTuple):
    """Where ``bits`` bits of every number are, in a field of bytes that consists of ``runs`` equal runs.

    The lowest bits of a run's bytes belong to its first numbers, one for each byte, the next bits to the
    numbers after these, and so on.
    """

    field: str
    bits: int
    runs: int = 1

    def read(self, blocks: Blocks) -> np.ndarray:
        """Returns these bits of the numbers, uint8 ``[n, m, numbers]``."""
        raw = blocks[self.field]
        runs = raw.reshape(*blocks.shape, self.runs, 1, raw.shape[-1] // self.runs)
        numbers: np.ndarray = runs >> self._places & (1 << self.bits) - 1
        return numbers.reshape(*blocks.shape, -1)

    def write(self, blocks: Blocks, numbers: np.ndarray) -> None:
        """Stores these bits, the lowest of ``numbers``."""
        lowest = (numbers & (1 << self.bits) - 1).reshape(*blocks.shape, self.runs, 8 // self.bits, -1)
        packed = np.bitwise_or.reduce(lowest << self._places, axis=-2)
        blocks[self.field] = packed.reshape(*blocks.shape, -1)

    @property
    def _places(self) -> np.ndarray:
        return np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]


class Numbers(NamedTuple):
    """Small integers of a block: their bits, the lowest first, and whether they are signed.

    Signed numbers are stored in two's complement if they have eight bits, else with half of their range
    added.
    """

    parts: tuple[Bits, ...]
    signed: bool = False

    @property
    def bits(self) -> int:
        """The number of bits of each number."""
        return sum(part.bits for part in self.parts)

    @property
    def low(self) -> int:
        """The least number."""
        return -(1 << self.bits - 1) if self.signed else 0

    @property
    def high(self) -> int:
        """The greatest number."""
        return self.low + (1 << self.bits) - 1

    @property
    def _added(self) -> int:
        return 0 if self.bits == 8 else -self.low

    def read(self, blocks: Blocks) -> np.ndarray:
        """Returns the numbers of blocks, int8 or uint8 ``[n, m, numbers]``."""
        stored = self.parts[0].read(blocks)
        shift = self.parts[0].bits
        for part in self.parts[1:]:
            stored |= part.read(blocks) << shift
            shift += part.bits
        return stored.view(np.int8) - np.int8(self._added) if self.signed else stored

    def write(self, blocks: Blocks, numbers: np.ndarray) -> None:
        """Stores numbers ``[n, m, numbers]`` of any integer type."""
        stored = (numbers + self._added).astype(np.uint8)
        for part in self.parts:
            part.write(blocks, stored)
            stored >>= part.bits


class SixBits(Numbers):
    """Eight scales and eight minima of six bits in the twelve bytes of ``scales`` in Q4_K and Q5_K; the top
    bits of the first eight bytes belong to the last four of each.
    """

    bits = 6

    def read(self, blocks: Blocks) -> np.ndarray:
        """Returns the scales, then the minima."""
        first, second, third = np.split(blocks["scales"], 3, axis=-1)
        return np.concatenate(
            [first & 63, third & 15 | first >> 6 << 4, second & 63, third >> 4 | second >> 6 << 4], axis=-1
        )

    def write(self, blocks: Blocks, numbers: np.ndarray) -> None:
        """Stores the scales and the minima."""
        s, top_s, m, top_m = np.split(numbers.astype(np.uint8), 4, axis=-1)
        blocks["scales"] = np.concatenate(
            [s | top_s >> 4 << 6, m | top_m >> 4 << 6, top_s & 15 | (top_m & 15) << 4], axis=-1
        )


class BlockType(NamedTuple):
    """A block type: its fields, its codes and their levels, the numbers whose products with the float16 ``d``
    are the scales (None: ``d`` is the only one), and the width of a group.

    Minima are floats ``m``, or the products of ``-dmin`` with a second half of these numbers.
    """

    fields: np.dtype[Any]
    codes: Numbers
    levels: Levels
    multiples: Numbers | None = None
    width: int = 32

    def unpack(self, parts: Parts, rows: slice) -> QuantizedRows:
        """Reads the codes, scales and minima of rows."""
        blocks = self._blocks(parts, rows)
        return QuantizedRows(self.codes.read(blocks).reshape(len(blocks), -1), *self._scales(blocks))

    def pack(self, parts: Parts, rows: slice, quantized: QuantizedRows) -> list[PartUpdate]:
        """Returns the update that stores quantized rows.

        Blocks whose scales did not change keep their fields, because the K types can store the same scales in
        several ways.
        """
        blocks = self._blocks(parts, rows).copy()
        scale, minimum = self._scales(blocks)
        moved = (quantized.scale != scale).reshape(*blocks.shape, -1).any(axis=-1)
        if minimum is not None and quantized.zero is not None:
            moved |= (quantized.zero != minimum).reshape(*blocks.shape, -1).any(axis=-1)
        fresh = blocks.copy()
        # Blocks that keep their scales may overflow here; their fresh fields are discarded below.
        with np.errstate(all="ignore"):
            self._put_scales(fresh, quantized.scale, quantized.zero)
        blocks = np.where(moved, fresh, blocks)
        self.codes.write(blocks, quantized.codes.reshape(*blocks.shape, -1))
        return [PartUpdate("codes", rows, blocks.view(np.uint8).reshape(len(blocks), -1))]

    def round_scales(self, parts: Parts, rows: slice, scale: Rows, minimum: Rows | None) -> ScaleRows:
        """Rounds scales and minima to what blocks can store."""
        blocks = self._blocks(parts, rows).copy()
        self._put_scales(blocks, scale, minimum)
        return self._scales(blocks)

    def _blocks(self, parts: Parts, rows: slice) -> Blocks:
        """Returns the blocks of rows."""
        return np.ascontiguousarray(parts["codes"][rows]).view(self.fields)

    def _scales(self, blocks: Blocks) -> ScaleRows:
        """Returns the scale and the minimum, if there is one, of each group, float32 ``[n, groups]``."""
        present = self.fields.names or ()
        floats = {name: blocks[name].astype(np.float32) for name in ("d", "m", "dmin") if name in present}
        if self.multiples is None:
            return floats["d"], floats.get("m")
        numbers = self.multiples.read(blocks).astype(np.float32)
        scale, *minimum = (
            (unit[..., None] * times).reshape(len(blocks), -1)
            for unit, times in zip(floats.values(), np.split(numbers, len(floats), axis=-1), strict=True)
        )
        return scale, -minimum[0] if minimum else None

    def _put_scales(self, blocks: Blocks, scale: Rows, minimum: Rows | None) -> None:
        """Stores scales and minima, rounded to the nearest values that the blocks can hold."""
        if self.multiples is None:
            blocks["d"] = scale.reshape(blocks.shape)
            if minimum is not None:
                blocks["m"] = minimum.reshape(blocks.shape)
            return
        numbers = []
        for unit, values in (("d", scale), ("dmin", None if minimum is None else -minimum)):
            if values is not None:
                blocks[unit], times = self._unit(values.reshape(*blocks.shape, -1), self.multiples)
                numbers.append(times)
        self.multiples.write(blocks, np.concatenate(numbers, axis=-1))

    @staticmethod
    def _unit(values: Rows, numbers: Numbers) -> tuple[np.ndarray, np.ndarray]:
        """Returns the float16 that ``values`` ``[..., n]`` are multiples of, and the multiples."""
        extreme = _extreme(values.min(axis=-1), values.max(axis=-1))
        with np.errstate(all="ignore"):
            unit = (extreme / F32.type(numbers.low or numbers.high)).astype(np.float16)
            times = np.nan_to_num(values / unit.astype(np.float32)[..., None], posinf=0, neginf=0)
        return unit, np.clip(np.rint(times), numbers.low, numbers.high).astype(np.int64)


def _extreme(least: Rows, greatest: Rows) -> Rows:
    """Returns the value of greatest magnitude in each group, with its sign."""
    return np.where(-least > greatest, least, greatest)


def _around_zero(codes: Numbers) -> Levels:
    """Returns signed integer levels with one more level below zero; the value of greatest magnitude gets the
    lowest code, whatever its sign.
    """
    return integers(codes.low, codes.high, np.int8)._replace(
        fit=lambda least, greatest: (_extreme(least, greatest) / F32.type(codes.low), None)
    )


def _from_minimum(codes: Numbers, below: bool) -> Levels:
    """Returns integer levels from zero, to which a minimum is added; with ``below``, the minimum is at most
    zero.
    """

    def fit(least: Rows, greatest: Rows) -> ScaleRows:
        least = np.minimum(least, 0) if below else least
        return (np.maximum(greatest, least) - least) / F32.type(codes.high), least

    return integers(0, codes.high, np.uint8)._replace(fit=fit)


def _block(
    codes: tuple[Bits, ...], multiples: Numbers | None = None, width: int = 32, **fields: str
) -> BlockType:
    """Returns a block type with these ``fields``, in their order; codes of a block with minima count from
    zero, others around zero.
    """
    has_minimum = not fields.keys().isdisjoint({"m", "dmin"})
    numbers = Numbers(codes, signed=not has_minimum)
    levels = (
        _from_minimum(numbers, below=multiples is not None)
        if has_minimum
        else integers(-127, 127, np.int8)
        if numbers.bits == 8
        else _around_zero(numbers)
    )
    return BlockType(np.dtype(list(fields.items())), numbers, levels, multiples, width)


_FIFTH = Bits("qh", 1, 4)
_NIBBLES = Bits("qs", 4)
TYPES = {
    "Q4_0": _block((_NIBBLES,), d="<f2", qs="16u1"),
    "Q4_1": _block((_NIBBLES,), d="<f2", m="<f2", qs="16u1"),
    "Q5_0": _block((_NIBBLES, _FIFTH), d="<f2", qh="4u1", qs="16u1"),
    "Q5_1": _block((_NIBBLES, _FIFTH), d="<f2", m="<f2", qh="4u1", qs="16u1"),
    "Q8_0": _block((Bits("qs", 8),), d="<f2", qs="32u1"),
    "Q2_K": _block(
        (Bits("qs", 2, 2),), Numbers((Bits("scales", 4),)), 16, scales="16u1", qs="64u1", d="<f2", dmin="<f2"
    ),
    "Q3_K": _block(
        (Bits("qs", 2, 2), Bits("hmask", 1)),
        Numbers((Bits("scales", 4), Bits("tops", 2)), signed=True),
        16,
        hmask="32u1",
        qs="64u1",
        scales="8u1",
        tops="4u1",
        d="<f2",
    ),
    "Q4_K": _block((Bits("qs", 4, 4),), SixBits(()), d="<f2", dmin="<f2", scales="12u1", qs="128u1"),
    "Q5_K": _block(
        (Bits("qs", 4, 4), Bits("qh", 1)),
        SixBits(()),
        d="<f2",
        dmin="<f2",
        scales="12u1",
        qh="32u1",
        qs="128u1",
    ),
    "Q6_K": _block(
        (Bits("ql", 4, 2), Bits("qh", 2, 2)),
        Numbers((Bits("scales", 8),), signed=True),
        16,
        ql="128u1",
        qh="64u1",
        scales="16u1",
        d="<f2",
    ),
}
"""The block types that can be read and written, by llama.cpp's names."""


def weight(name: str, kind: str, shape: tuple[int, int]) -> Weight:
    """Returns the weight ``name`` ``[out, in]`` in blocks of type ``kind``; its only part is uint8 ``[out,
    bytes per row]``.

    A type without an entry in :data:`TYPES` is decoded by the ``gguf`` package and cannot be encoded.
    """
    stored = partial(Weight, kind, name, shape, "F32", {"codes": name})
    if kind not in TYPES:
        return stored(
            Grid(_AS_IS, Groups(shape[1])),
            partial(_by_package, kind),
            lambda *_: [],
            read_only_reason="no quantizer for it is known",
        )
    type_ = TYPES[kind]
    together = TENSOR_TYPES[TYPE_NUMBERS[kind]].block // type_.width
    grid = Grid(type_.levels, Groups(type_.width), True, together)
    return stored(grid, type_.unpack, type_.pack, type_.round_scales)


_AS_IS = Levels(
    lambda codes: codes,
    lambda level: level,
    lambda least, greatest: (greatest, None),
    lambda codes: np.zeros((1, 1), np.float32),
)


def _by_package(kind: str, parts: Parts, rows: slice) -> QuantizedRows:
    """Decodes rows with the ``gguf`` package, as values with a scale of one."""
    from .package import library  # noqa: PLC0415 - only rare types need it

    gguf = library()
    values = gguf.quants.dequantize(
        np.ascontiguousarray(parts["codes"][rows]), gguf.GGMLQuantizationType(TYPE_NUMBERS[kind])
    )
    return QuantizedRows(np.asarray(values, np.float32), np.ones((len(values), 1), np.float32))
