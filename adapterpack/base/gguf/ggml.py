"""Reads and writes llama.cpp's quantized blocks (GGUF): runs of a row that share float16 scales or, in the K
types, small multiples of one.

The layouts follow ggml's ``ggml-common.h``. Every type here is a grid ``scale * code`` or ``scale * code +
minimum``, described by a value: the fields of its block, how codes are packed in them, and how its scales are
stored.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..codecs.base import Parts, Weight
from ..codecs.grid import F32, Grid, Groups, Levels, QuantizedRows, Rows, integers
from ..codecs.storage import PartUpdate
from . import ggml_bits as bits
from .tensor_types import TENSOR_TYPES, TYPE_NUMBERS

Blocks = np.ndarray
"""An array ``[n, blocks per row]`` of one type's structure."""


class Scales(NamedTuple):
    """How the scales of a block are stored.

    ``read`` returns scale and minimum (or None) of each group in blocks, float32 ``[n, groups]``. ``write``
    stores them in blocks, rounded to the nearest values that the blocks can hold.
    """

    read: Callable[[Blocks], tuple[Rows, Rows | None]]
    write: Callable[[Blocks, Rows, Rows | None], None]


class BlockType(NamedTuple):
    """A block type: its fields, how to read and write its codes and its scales, the width of a group, and the
    levels of its codes.
    """

    fields: np.dtype[Any]
    unpack: Callable[[Blocks], np.ndarray]
    pack: Callable[[Blocks, np.ndarray], None]
    scales: Scales
    width: int
    levels: Levels


def _extreme(least: Rows, greatest: Rows) -> Rows:
    """Returns the value of greatest magnitude in each group, with its sign."""
    return np.where(-least > greatest, least, greatest)


def _quantize_signed(low: int, high: int) -> Levels:
    """Returns signed integer levels with one more level below zero; the value of greatest magnitude gets the
    lowest code, whatever its sign.
    """
    return integers(low, high, np.int8)._replace(
        fit=lambda least, greatest: (_extreme(least, greatest) / F32.type(low), None)
    )


def _from_minimum(top: int, below: bool) -> Levels:
    """Returns integer levels from zero, to which a minimum is added; with ``below``, the minimum is at most
    zero.
    """

    def fit(least: Rows, greatest: Rows) -> tuple[Rows, Rows | None]:
        least = np.minimum(least, 0) if below else least
        return (np.maximum(greatest, least) - least) / F32.type(top), least

    return integers(0, top, np.uint8)._replace(fit=fit)


def _plain_scales(blocks: Blocks) -> tuple[Rows, Rows | None]:
    """Reads a float16 scale and an optional minimum from each block."""
    minimum = blocks["m"].astype(np.float32) if "m" in (blocks.dtype.names or ()) else None
    return blocks["d"].astype(np.float32), minimum


def _put_plain(blocks: Blocks, scale: Rows, minimum: Rows | None) -> None:
    """Writes a float16 scale and an optional minimum to each block."""
    blocks["d"] = scale.reshape(blocks.shape)
    if minimum is not None:
        blocks["m"] = minimum.reshape(blocks.shape)


_PLAIN = Scales(_plain_scales, _put_plain)


def _multiples(
    read: Callable[[Blocks], tuple[np.ndarray, np.ndarray | None]],
    write: Callable[[Blocks, np.ndarray, np.ndarray | None], None],
    low: int,
    high: int,
) -> Scales:
    """Returns how to store scales as integers ``low .. high`` times the block's float16 ``d``, and minima as
    integers times ``-dmin``.
    """

    def read_scales(blocks: Blocks) -> tuple[Rows, Rows | None]:
        scale, minimum = read(blocks)
        d = blocks["d"].astype(np.float32)[..., None] * scale.astype(np.float32)
        least = (
            None
            if minimum is None
            else -(blocks["dmin"].astype(np.float32)[..., None] * minimum.astype(np.float32))
        )
        return d.reshape(len(blocks), -1), None if least is None else least.reshape(len(blocks), -1)

    def write_scales(blocks: Blocks, scale: Rows, minimum: Rows | None) -> None:
        scale = scale.reshape(*blocks.shape, -1)
        blocks["d"], units = _unit(scale, low, high)
        steps = None
        if minimum is not None:
            blocks["dmin"], steps = _unit(-minimum.reshape(*blocks.shape, -1), 0, high)
        write(blocks, units, steps)

    return Scales(read_scales, write_scales)


def _unit(values: Rows, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the float16 that ``values`` ``[..., n]`` are multiples of, and the multiples."""
    extreme = _extreme(values.min(axis=-1), values.max(axis=-1))
    with np.errstate(all="ignore"):
        unit = (extreme / F32.type(low if low else high)).astype(np.float16)
        times = np.nan_to_num(values / unit.astype(np.float32)[..., None], posinf=0, neginf=0)
    return unit, np.clip(np.rint(times), low, high).astype(np.int64)


def _fields(**parts: Any) -> np.dtype[Any]:
    """Returns the structure of a block."""
    return np.dtype(
        [(name, *(field if isinstance(field, tuple) else (field,))) for name, field in parts.items()]
    )


TYPES = {
    "Q4_0": BlockType(
        _fields(d="<f2", qs=("u1", 16)),
        partial(bits.nibbles, 8),
        partial(bits.put_nibbles, 8),
        _PLAIN,
        32,
        _quantize_signed(-8, 7),
    ),
    "Q4_1": BlockType(
        _fields(d="<f2", m="<f2", qs=("u1", 16)),
        partial(bits.nibbles, 0),
        partial(bits.put_nibbles, 0),
        _PLAIN,
        32,
        _from_minimum(15, below=False),
    ),
    "Q5_0": BlockType(
        _fields(d="<f2", qh=("u1", 4), qs=("u1", 16)),
        partial(bits.fives, 16),
        partial(bits.put_fives, 16),
        _PLAIN,
        32,
        _quantize_signed(-16, 15),
    ),
    "Q5_1": BlockType(
        _fields(d="<f2", m="<f2", qh=("u1", 4), qs=("u1", 16)),
        partial(bits.fives, 0),
        partial(bits.put_fives, 0),
        _PLAIN,
        32,
        _from_minimum(31, below=False),
    ),
    "Q8_0": BlockType(
        _fields(d="<f2", qs=("i1", 32)),
        bits.eights,
        bits.put_eights,
        _PLAIN,
        32,
        integers(-127, 127, np.int8),
    ),
    "Q2_K": BlockType(
        _fields(scales=("u1", 16), qs=("u1", 64), d="<f2", dmin="<f2"),
        bits.q2,
        bits.put_q2,
        _multiples(bits.q2_scales, bits.put_q2_scales, 0, 15),
        16,
        _from_minimum(3, below=True),
    ),
    "Q3_K": BlockType(
        _fields(hmask=("u1", 32), qs=("u1", 64), scales=("u1", 12), d="<f2"),
        bits.q3,
        bits.put_q3,
        _multiples(bits.q3_scales, bits.put_q3_scales, -32, 31),
        16,
        _quantize_signed(-4, 3),
    ),
    "Q4_K": BlockType(
        _fields(d="<f2", dmin="<f2", scales=("u1", 12), qs=("u1", 128)),
        bits.q4,
        bits.put_q4,
        _multiples(bits.six_bits, bits.put_six_bits, 0, 63),
        32,
        _from_minimum(15, below=True),
    ),
    "Q5_K": BlockType(
        _fields(d="<f2", dmin="<f2", scales=("u1", 12), qh=("u1", 32), qs=("u1", 128)),
        bits.q5,
        bits.put_q5,
        _multiples(bits.six_bits, bits.put_six_bits, 0, 63),
        32,
        _from_minimum(31, below=True),
    ),
    "Q6_K": BlockType(
        _fields(ql=("u1", 128), qh=("u1", 64), scales=("i1", 16), d="<f2"),
        bits.q6,
        bits.put_q6,
        _multiples(lambda blocks: (blocks["scales"], None), bits.put_q6_scales, -128, 127),
        16,
        _quantize_signed(-32, 31),
    ),
}
"""The block types that can be read and written, by llama.cpp's names."""


def weight(name: str, kind: str, shape: tuple[int, int]) -> Weight:
    """Returns the weight ``name`` ``[out, in]`` in blocks of type ``kind``; its only part is uint8 ``[out,
    bytes per row]``.

    A type without an entry in :data:`TYPES` is decoded by the ``gguf`` package and cannot be encoded.
    """
    if kind not in TYPES:
        decode = partial(_by_package, kind)
        return Weight(
            kind,
            name,
            shape,
            "F32",
            {"codes": name},
            Grid(_AS_IS, Groups(shape[1])),
            decode,
            lambda *_: [],
            read_only_reason="no quantizer for it is known",
        )
    type_ = TYPES[kind]
    grid = Grid(
        type_.levels, Groups(type_.width), True, TENSOR_TYPES[TYPE_NUMBERS[kind]].block // type_.width
    )
    return Weight(
        kind,
        name,
        shape,
        "F32",
        {"codes": name},
        grid,
        partial(_unpack, type_),
        partial(_pack, type_),
        partial(_round_scales, type_),
    )


def _blocks(type_: BlockType, parts: Parts, rows: slice) -> Blocks:
    """Returns the blocks of rows."""
    return np.ascontiguousarray(parts["codes"][rows]).view(type_.fields)


def _unpack(type_: BlockType, parts: Parts, rows: slice) -> QuantizedRows:
    """Reads the codes, scales and minima of rows."""
    blocks = _blocks(type_, parts, rows)
    return QuantizedRows(type_.unpack(blocks).reshape(len(blocks), -1), *type_.scales.read(blocks))


def _pack(type_: BlockType, parts: Parts, rows: slice, quantized: QuantizedRows) -> list[PartUpdate]:
    """Returns the update that stores quantized rows.

    Blocks whose scales did not change keep their fields, because the K types can store the same scales in
    several ways.
    """
    blocks = _blocks(type_, parts, rows).copy()
    scale, minimum = type_.scales.read(blocks)
    moved = (quantized.scale != scale).reshape(*blocks.shape, -1).any(axis=-1)
    if minimum is not None and quantized.zero is not None:
        moved |= (quantized.zero != minimum).reshape(*blocks.shape, -1).any(axis=-1)
    fresh = blocks.copy()
    # Blocks that keep their scales may overflow here; their fresh fields are discarded below.
    with np.errstate(all="ignore"):
        type_.scales.write(fresh, quantized.scale, quantized.zero)
    blocks = np.where(moved, fresh, blocks)
    type_.pack(blocks, quantized.codes.reshape(*blocks.shape, -1))
    return [PartUpdate("codes", rows, blocks.view(np.uint8).reshape(len(blocks), -1))]


def _round_scales(
    type_: BlockType, parts: Parts, rows: slice, scale: Rows, minimum: Rows | None
) -> tuple[Rows, Rows | None]:
    """Rounds scales and minima to what blocks can store."""
    blocks = _blocks(type_, parts, rows).copy()
    type_.scales.write(blocks, scale, minimum)
    return type_.scales.read(blocks)


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
