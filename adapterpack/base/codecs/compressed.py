"""Reads and writes compressed-tensors, llm-compressor's format: ``pack-quantized``, ``int-quantized`` and
``float-quantized`` weights.

Integers are ``scale * (code - zero)`` with codes around zero. Packed codes have half of their range added and
are packed into words along the inputs, their zero points into words along the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ...errors import FormatError
from ...io.safetensors import DTYPES
from ..checkpoint import Checkpoint
from ..quantization import settings
from . import bits
from .base import Codec, ModuleTensors, Parts, Weight, modules_with, unreadable
from .fp8 import tile_weight
from .grid import Grid, Groups, QuantizedRows, integers, rounded
from .registry import CODECS
from .storage import PartUpdate

_SCALES = ("F32", "BF16", "F16")


def match(base: Checkpoint) -> list[Weight]:
    """Returns the weights of modules with a ``weight_packed`` or a ``weight_scale``."""
    config = settings(base.config)
    groups = config.get("config_groups")
    schemes = (
        [scheme for scheme in groups.values() if isinstance(scheme, dict)] if isinstance(groups, dict) else []
    )
    arguments = [scheme["weights"] for scheme in schemes if isinstance(scheme.get("weights"), dict)]
    if len(arguments) != 1:
        raise unreadable(
            "compressed-tensors", base, "config_groups", f"{len(arguments)} schemes of weights", "one"
        )
    args = arguments[0]
    if args.get("actorder") not in (None, "static", "weight", False):
        raise unreadable(
            "compressed-tensors", base, "actorder", repr(args.get("actorder"))[:40], "static or none"
        )
    if args.get("type") == "float":
        if args.get("num_bits") != 8:
            raise unreadable("compressed-tensors", base, "floats of so many bits", args.get("num_bits"), 8)
        return [_floats(module, args) for module in modules_with(base, "compressed-tensors", ".weight_scale")]
    packed = [
        _integers(module, args, True) for module in modules_with(base, "compressed-tensors", ".weight_packed")
    ]
    return packed or [
        _integers(module, args, False) for module in modules_with(base, "compressed-tensors", ".weight_scale")
    ]


def _floats(module: ModuleTensors, args: Mapping[str, Any]) -> Weight:
    """Returns a float8 weight."""
    codes = module.part("weight", ("F8_E4M3", "F8_E5M2"), (None, None))
    rows, columns = module.base.stored[codes].shape
    if args.get("strategy") not in ("tensor", "channel", "block"):
        raise unreadable(
            module.codec, module.base, "strategy", args.get("strategy"), "tensor, channel or block"
        )
    tile = {"channel": [1, columns], "block": args.get("block_structure"), "tensor": [rows, columns]}[
        str(args.get("strategy"))
    ]
    if not (isinstance(tile, list) and len(tile) == 2 and all(type(n) is int and n > 0 for n in tile)):
        raise FormatError(
            "a block must be two numbers",
            where=f"{module.base.folder}, block_structure",
            found=repr(tile)[:80],
        )
    return tile_weight(module, "weight", "weight_scale", tile)


class _Layout(NamedTuple):
    """Bits per code, columns of the weight, whether codes are packed into words, and how many rows share a
    scale.
    """

    bits: int
    columns: int
    packed: bool
    height: int

    @property
    def half(self) -> int:
        """The offset that packing adds to a code."""
        return 1 << self.bits - 1

    def scales(self, rows: slice) -> slice:
        """Returns the rows of scales that belong to these rows."""
        return slice(rows.start // self.height, -(-rows.stop // self.height))

    def words(self, rows: slice) -> slice:
        """Returns the words of zero points that belong to these rows."""
        return slice(rows.start * self.bits // 32, -(-rows.stop * self.bits // 32))


def _integers(module: ModuleTensors, args: Mapping[str, Any], packed: bool) -> Weight:
    """Returns an integer weight, after checking the shapes of its parts."""
    base, width = module.base, args.get("num_bits")
    if type(width) is not int or width not in ((2, 4, 8) if packed else (8,)):
        raise unreadable(module.codec, base, "num_bits", width, "4 or 8")
    if module.has("weight_g_idx"):
        raise unreadable(module.codec, base, "groups that are no neighbours", f"{module.path}.weight_g_idx")
    parts = {}
    if packed:
        parts["shape"] = module.part("weight_shape", ("I64", "I32"), (2,))
        rows, columns = (int(n) for n in base.read(parts["shape"]))
        if not 0 < rows < 1 << 32 or not 0 < columns < 1 << 32:
            raise FormatError(
                "a shape that no weight has", where=f"{base.folder}, {parts['shape']}", found=[rows, columns]
            )
        parts["codes"] = module.part("weight_packed", ("I32",), (rows, -(-columns * width // 32)))
    else:
        parts["codes"] = module.part("weight", ("I8",), (None, None))
        rows, columns = base.stored[parts["codes"]].shape
    groups = module.shape("weight_scale") if module.has("weight_scale") else ()
    height = 1 if groups and groups[0] == rows else rows
    count = groups[1] if len(groups) == 2 else 1
    parts["scale"] = module.part(
        "weight_scale", _SCALES, (rows // height, *groups[1:]) if height == 1 else (1,) * len(groups)
    )
    if not count or columns % count:
        raise FormatError(
            "the scales do not fit the weight",
            where=f"{base.folder}, {parts['scale']}",
            found=list(groups),
            expected=f"{rows} rows, and a divisor of {columns} columns",
        )
    layout = _Layout(width, columns, packed, height)
    zero_range = None
    if module.has("weight_zero_point"):
        shape = (-(-rows * width // 32), count) if packed else (rows // height, *groups[1:])
        parts["zero"] = module.part("weight_zero_point", ("I32",) if packed else ("I8",), shape)
        if packed and height != 1:
            raise unreadable(module.codec, base, "one zero point for all rows", parts["zero"])
        zero_range = (-layout.half, layout.half - 1)
    round_scales = rounded(DTYPES[base.stored[parts["scale"]].dtype])
    # Packed zero points share words along the outputs, so blocks of rows must contain complete words.
    step = max(height, 32 // width if packed and zero_range else 1)
    return Weight(
        module.codec,
        f"{module.path}.weight",
        (rows, columns),
        base.stored[parts["scale"]].dtype,
        parts,
        Grid(integers(-layout.half, layout.half - 1, np.int8, zero_range), Groups(columns // count, height)),
        partial(_unpack, layout),
        partial(_pack, layout),
        lambda _, __, *fitted: round_scales(*fitted),
        step,
    )


def _unpack(layout: _Layout, parts: Parts, rows: slice) -> QuantizedRows:
    """Reads the codes, scales and zero points of rows."""
    at, codes, zero = layout.scales(rows), parts["codes"][rows], None
    if layout.packed:
        codes = (bits.unpack(codes, layout.bits, layout.columns).astype(np.int16) - layout.half).astype(
            np.int8
        )
    if "zero" in parts:
        zero = (
            parts["zero"][at].reshape(at.stop - at.start, -1).astype(np.float32)
            if not layout.packed
            else bits.unpack(
                parts["zero"][layout.words(rows)].T, layout.bits, rows.stop - rows.start
            ).T.astype(np.float32)
            - layout.half
        )
    scales = parts["scale"] if parts["scale"].ndim == 2 else parts["scale"].reshape(-1, 1)
    return QuantizedRows(codes, scales[at].astype(np.float32), zero)


def _pack(layout: _Layout, parts: Parts, rows: slice, quantized: QuantizedRows) -> list[PartUpdate]:
    """Returns the updates that store quantized rows."""
    at, codes = layout.scales(rows), quantized.codes
    if layout.packed:
        codes = bits.pack(codes.astype(np.int16) + layout.half, layout.bits)
    updates = [
        PartUpdate("codes", rows, codes),
        PartUpdate("scale", at, quantized.scale.astype(parts["scale"].dtype)),
    ]
    if quantized.zero is None:
        return updates
    if not layout.packed:
        return [*updates, PartUpdate("zero", at, quantized.zero.astype(np.int8))]
    return [
        *updates,
        PartUpdate(
            "zero",
            layout.words(rows),
            bits.pack(quantized.zero.T.astype(np.int16) + layout.half, layout.bits).T,
        ),
    ]


CODECS.register(Codec("compressed-tensors", "packed and plain integers, float8", match))
