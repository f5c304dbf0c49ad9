"""Reads and writes 4-bit bitsandbytes weights: NF4 and FP4, with and without double quantization (QLoRA,
arXiv 2305.14314, section 3).

The codes of the flattened weight are stored two per byte, the first in the high half. Each ``blocksize`` of
them share an ``absmax``. With double quantization the ``absmax`` is itself a code, in blocks of
``nested_blocksize``: ``nested_quant_map[code] * nested_absmax + nested_offset``. A merge does not change the
offset and ``nested_absmax``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ...errors import FormatError
from ...io import FLOATS, strict_json
from .. import Checkpoint
from .base import ModuleTensors, Parts, Weight, modules_with, unreadable
from .grid import Grid, Groups, QuantizedRows, table
from .storage import PartUpdate

_STATE = ".weight.quant_state.bitsandbytes__"
_MAX_STATE = 1 << 16
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def match(base: Checkpoint) -> list[Weight]:
    """Returns the weights of modules with a ``quant_state``."""
    return [
        _weight(module, kind)
        for kind in ("nf4", "fp4")
        for module in modules_with(base, f"bitsandbytes {kind}", f"{_STATE}{kind}")
    ]


def _weight(module: ModuleTensors, kind: str) -> Weight:
    """Returns the weight of one module, after checking the shapes of its parts."""
    base = module.base
    state_name = f"{module.path}{_STATE}{kind}"
    rows, columns, block, nested, dtype = _state(module, state_name)
    blocks = -(-rows * columns // block)
    packed = module.part("weight", tuple({"U8", *FLOATS}))
    if base.stored[packed].nbytes != -(-rows * columns // 2):
        raise FormatError(
            "the packed weight does not fit its shape",
            where=f"{base.folder}, {packed}",
            found=base.stored[packed].nbytes,
            expected=f"{-(-rows * columns // 2)} bytes",
        )
    parts = {
        "codes": packed,
        "absmax": module.part("weight.absmax", ("U8",) if nested else ("F32",), (blocks,)),
        "map": module.part("weight.quant_map", ("F32",), (16,)),
        "state": state_name,
    }
    if nested:
        size, _ = nested
        parts |= {
            "nested": module.part("weight.nested_absmax", ("F32",), (-(-blocks // size),)),
            "nested_map": module.part("weight.nested_quant_map", ("F32",), (256,)),
        }
    levels = np.array(base.read(parts["map"]))
    if not np.isfinite(levels).all() or not 0 < np.abs(levels).max() <= 1:
        raise FormatError(
            "a table of levels must be numbers from -1 to 1", where=f"{base.folder}, {parts['map']}"
        )
    layout = _Layout(columns, block, nested)
    # Blocks run across rows: a step is the fewest rows that begin at both a block and a byte.
    unit = math.lcm(columns, block, 2) // columns
    return Weight(
        module.codec,
        f"{module.path}.weight",
        (rows, columns),
        dtype,
        parts,
        Grid(table(levels), Groups(block)),
        layout.unpack,
        layout.pack,
        layout.round_scales,
        min(rows, unit),
    )


class _Layout(NamedTuple):
    """Columns of the weight, values per block, and (block size, offset) of the second quantization."""

    columns: int
    block: int
    nested: tuple[int, float] | None

    def unpack(self, parts: Parts, rows: slice) -> QuantizedRows:
        """Reads the codes and scales of rows; since blocks may cross rows, as one row per block."""
        at = self._blocks(rows)
        packed = _bytes(parts)[at.start * self.block // 2 : at.stop * self.block // 2]
        codes = np.zeros((at.stop - at.start, self.block), np.uint8)
        flat = codes.reshape(-1)
        flat[: 2 * len(packed) : 2] = packed >> 4
        flat[1 : 2 * len(packed) : 2] = packed & 15
        return QuantizedRows(codes, self._scales(parts, at, parts["absmax"][at])[:, None])

    def pack(self, parts: Parts, rows: slice, quantized: QuantizedRows) -> list[PartUpdate]:
        """Returns the updates that store quantized rows; unchanged scales keep their stored form."""
        at = self._blocks(rows)
        flat = quantized.codes.reshape(-1)
        scales = quantized.scale[:, 0]
        start = at.start * self.block // 2
        packed = (flat[0::2] << 4 | flat[1::2])[: len(_bytes(parts)) - start]
        old = parts["absmax"][at]
        absmax = np.where(scales == self._scales(parts, at, old), old, self._codes(parts, at, scales))
        return [
            PartUpdate("codes", slice(start, start + len(packed)), packed),
            PartUpdate("absmax", at, absmax),
        ]

    def round_scales(
        self, parts: Parts, rows: slice, scales: np.ndarray, zero: np.ndarray | None
    ) -> tuple[np.ndarray, None]:
        """Rounds scales to what the second quantization can store."""
        at = self._blocks(rows)
        return self._scales(parts, at, self._codes(parts, at, scales[:, 0]))[:, None], None

    def _blocks(self, rows: slice) -> slice:
        """Returns the blocks that contain these rows."""
        return slice(rows.start * self.columns // self.block, -(-rows.stop * self.columns // self.block))

    def _scales(self, parts: Parts, blocks: slice, codes: np.ndarray) -> np.ndarray:
        """Returns the scales that the stored ``absmax`` values of ``blocks`` stand for."""
        if self.nested is None:
            return codes
        size, offset = self.nested
        scales: np.ndarray = parts["nested_map"][codes] * _outer(parts, blocks, size) + np.float32(offset)
        return scales

    def _codes(self, parts: Parts, blocks: slice, scales: np.ndarray) -> np.ndarray:
        """Returns the stored ``absmax`` values nearest to the scales."""
        if self.nested is None:
            return scales
        size, offset = self.nested
        with np.errstate(all="ignore"):
            level = (scales - np.float32(offset)) / _outer(parts, blocks, size)
        return table(parts["nested_map"]).nearest(np.nan_to_num(level))


def _outer(parts: Parts, blocks: slice, size: int) -> np.ndarray:
    """Returns the scale of the second quantization, with blocks of ``size``, for each block."""
    scale: np.ndarray = parts["nested"][np.arange(blocks.start, blocks.stop) // size]
    return scale


def _bytes(parts: Parts) -> np.ndarray:
    """Returns the packed codes as bytes, whatever dtype they are stored as (``bnb_4bit_quant_storage``)."""
    return parts["codes"].reshape(-1).view(np.uint8)


def _state(module: ModuleTensors, name: str) -> tuple[int, int, int, tuple[int, float] | None, str]:
    """Returns rows, columns, block size, (block size, offset) of the second quantization, and dtype, from the
    stored quantization state.
    """
    where = f"{module.base.folder}, {name}"
    module.part(name.removeprefix(f"{module.path}."), ("U8",), (None,))
    state = strict_json.loads(bytes(module.base.read(name)), where, _MAX_STATE)
    shape = state.get("shape")
    block = state.get("blocksize")
    size = state.get("nested_blocksize")
    offset = state.get("nested_offset")
    sizes = [block] if size is None else [block, size]
    if not (
        isinstance(shape, list)
        and shape
        and all(type(n) is int and 0 < n < 1 << 32 for n in shape)
        and all(type(n) is int and 2 <= n <= 1 << 16 and n % 2 == 0 for n in sizes)
        and (size is None or (isinstance(offset, float | int) and math.isfinite(offset)))
    ):
        raise FormatError("a quantization state with impossible values", where=where, found=repr(state)[:200])
    if len(shape) != 2:
        raise unreadable(module.codec, module.base, "a weight that is no matrix", f"{name} {shape}")
    return (
        shape[0],
        shape[1],
        block,
        None if size is None else (size, float(offset)),
        _DTYPES.get(state.get("dtype"), "F32"),
    )
