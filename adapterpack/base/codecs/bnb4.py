"""bitsandbytes in 4 bits: NF4 and FP4, with and without double quantization (QLoRA, arXiv 2305.14314, section 3).

Codes of the flattened weight lie two in a byte, the first in the high half. Every ``blocksize`` of them share an ``absmax``; with double
quantization it is a code, in blocks of ``nested_blocksize``: ``nested_quant_map[code] * nested_absmax + nested_offset``. A merge leaves
the offset and ``nested_absmax`` as they are.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import numpy as np

from ...errors import FormatError
from ...io import strict_json
from ...io.safetensors import FLOATS
from ..checkpoint import Checkpoint
from .base import Parts, Place, Weight, places, unreadable
from .grid import Coded, Grid, Groups, table
from .storage import Piece

_STATE = ".weight.quant_state.bitsandbytes__"
_MAX_STATE = 1 << 16
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def find(base: Checkpoint) -> list[Weight]:
    """The weights that have a ``quant_state``."""
    return [_weight(place, kind) for kind in ("nf4", "fp4") for place in places(base, f"bitsandbytes {kind}", f"{_STATE}{kind}")]


def _weight(place: Place, kind: str) -> Weight:
    base, state_name = place.base, f"{place.path}{_STATE}{kind}"
    rows, columns, block, nested, dtype = _state(place, state_name)
    blocks = -(-rows * columns // block)
    packed = place.part("weight", tuple({"U8", *FLOATS}))
    if base.stored[packed].nbytes != -(-rows * columns // 2):
        raise FormatError("the packed weight does not fit its shape", where=f"{base.folder}, {packed}", found=base.stored[packed].nbytes,
                          expected=f"{-(-rows * columns // 2)} bytes")
    parts = {"codes": packed, "absmax": place.part("weight.absmax", ("U8",) if nested else ("F32",), (blocks,)),
             "map": place.part("weight.quant_map", ("F32",), (16,)), "state": state_name}
    if nested:
        size, _ = nested
        parts |= {"nested": place.part("weight.nested_absmax", ("F32",), (-(-blocks // size),)),
                  "nested_map": place.part("weight.nested_quant_map", ("F32",), (256,))}
    levels = np.array(base.read(parts["map"]))
    if not np.isfinite(levels).all() or not 0 < np.abs(levels).max() <= 1:
        raise FormatError("a table of levels must be numbers from -1 to 1", where=f"{base.folder}, {parts['map']}")
    form = _Form(columns, block, nested)
    unit = math.lcm(columns, block, 2) // columns
    return Weight(place.codec, f"{place.path}.weight", (rows, columns), dtype, parts, Grid(table(levels), Groups(block)),
                  partial(_unpack, form), partial(_pack, form), partial(_settle, form), min(rows, unit))


class _Form(NamedTuple):
    """Columns of the weight, values in a block, and (blocks in a block, offset) of the second quantization."""

    columns: int
    block: int
    nested: tuple[int, float] | None

    def blocks(self, rows: slice) -> slice:
        return slice(rows.start * self.columns // self.block, -(-rows.stop * self.columns // self.block))


def _state(place: Place, name: str) -> tuple[int, int, int, tuple[int, float] | None, str]:
    """Rows, columns, block size, (block size, offset) of the second quantization, dtype."""
    where = f"{place.base.folder}, {name}"
    place.part(name.removeprefix(place.path), ("U8",), (None,), bare=True)
    found = strict_json.loads(bytes(place.base.read(name)), where, _MAX_STATE)
    shape, block, size = found.get("shape"), found.get("blocksize"), found.get("nested_blocksize")
    offset = found.get("nested_offset")
    sizes = [block] if size is None else [block, size]
    if not (isinstance(shape, list) and shape and all(type(n) is int and 0 < n < 1 << 32 for n in shape)
            and all(type(n) is int and 2 <= n <= 1 << 16 and n % 2 == 0 for n in sizes)
            and (size is None or (isinstance(offset, float | int) and math.isfinite(offset)))):
        raise FormatError("a quantization state that cannot be", where=where, found=repr(found)[:200])
    if len(shape) != 2:
        raise unreadable(place.codec, place.base, "a weight that is no matrix", f"{name} {shape}")
    return shape[0], shape[1], block, None if size is None else (size, float(offset)), _DTYPES.get(found.get("dtype"), "F32")


def _unpack(form: _Form, parts: Parts, rows: slice) -> Coded:
    at = form.blocks(rows)
    packed = _bytes(parts)[at.start * form.block // 2 : at.stop * form.block // 2]
    codes = np.zeros((at.stop - at.start, form.block), np.uint8)
    flat = codes.reshape(-1)
    flat[: 2 * len(packed) : 2], flat[1 : 2 * len(packed) : 2] = packed >> 4, packed & 15
    return Coded(codes, _scales(form, parts, at, parts["absmax"][at])[:, None])


def _pack(form: _Form, parts: Parts, rows: slice, coded: Coded) -> list[Piece]:
    at, flat, scales = form.blocks(rows), coded.codes.reshape(-1), coded.scale[:, 0]
    start = at.start * form.block // 2
    packed = (flat[0::2] << 4 | flat[1::2])[: len(_bytes(parts)) - start]
    old = parts["absmax"][at]
    absmax = np.where(scales == _scales(form, parts, at, old), old, _codes(form, parts, at, scales))
    return [Piece("codes", slice(start, start + len(packed)), packed), Piece("absmax", at, absmax)]


def _settle(form: _Form, parts: Parts, rows: slice, scales: np.ndarray, zero: np.ndarray | None) -> tuple[np.ndarray, None]:
    at = form.blocks(rows)
    return _scales(form, parts, at, _codes(form, parts, at, scales[:, 0]))[:, None], None


def _scales(form: _Form, parts: Parts, blocks: slice, codes: np.ndarray) -> np.ndarray:
    """The scales that stored ``absmax`` of ``blocks`` stand for."""
    if form.nested is None:
        return codes
    scales: np.ndarray = parts["nested_map"][codes] * _second(form, parts, blocks) + np.float32(form.nested[1])
    return scales


def _codes(form: _Form, parts: Parts, blocks: slice, scales: np.ndarray) -> np.ndarray:
    if form.nested is None:
        return scales
    with np.errstate(all="ignore"):
        level = (scales - np.float32(form.nested[1])) / _second(form, parts, blocks)
    return table(parts["nested_map"]).nearest(np.nan_to_num(level))


def _second(form: _Form, parts: Parts, blocks: slice) -> np.ndarray:
    assert form.nested is not None
    second: np.ndarray = parts["nested"][np.arange(blocks.start, blocks.stop) // form.nested[0]]
    return second


def _bytes(parts: Parts) -> np.ndarray:
    """The packed codes, whatever dtype they are stored as (``bnb_4bit_quant_storage``)."""
    return parts["codes"].reshape(-1).view(np.uint8)
