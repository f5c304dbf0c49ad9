"""compressed-tensors, the format of llm-compressor: ``pack-quantized``, ``int-quantized`` and ``float-quantized`` weights.

Integers are ``scale * (code - zero)`` with codes around zero; packed ones have half their range added, in words along the inputs,
and their zero points in words along the outputs.
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
from .base import Parts, Place, Weight, places, unreadable
from .fp8 import tiled
from .grid import Coded, Grid, Groups, integers, rounded
from .storage import Piece

_SCALES = ("F32", "BF16", "F16")


def find(base: Checkpoint) -> list[Weight]:
    """The weights that have a ``weight_packed``, or a ``weight_scale`` beside them."""
    config = settings(base.config)
    groups = config.get("config_groups")
    schemes = [each for each in groups.values() if isinstance(each, dict)] if isinstance(groups, dict) else []
    arguments = [each["weights"] for each in schemes if isinstance(each.get("weights"), dict)]
    if len(arguments) != 1:
        raise unreadable("compressed-tensors", base, "config_groups", f"{len(arguments)} schemes of weights", "one")
    args = arguments[0]
    if args.get("actorder") not in (None, "static", "weight", False):
        raise unreadable("compressed-tensors", base, "actorder", repr(args.get("actorder"))[:40], "static or none")
    if args.get("type") == "float":
        if args.get("num_bits") != 8:
            raise unreadable("compressed-tensors", base, "floats of so many bits", args.get("num_bits"), 8)
        return [_floats(place, args) for place in places(base, "compressed-tensors", ".weight_scale")]
    packed = [_integers(place, args, True) for place in places(base, "compressed-tensors", ".weight_packed")]
    return packed or [_integers(place, args, False) for place in places(base, "compressed-tensors", ".weight_scale")]


def _floats(place: Place, args: Mapping[str, Any]) -> Weight:
    codes = place.part("weight", ("F8_E4M3", "F8_E5M2"), (None, None))
    rows, columns = place.base.stored[codes].shape
    if args.get("strategy") not in ("tensor", "channel", "block"):
        raise unreadable(place.codec, place.base, "strategy", args.get("strategy"), "tensor, channel or block")
    tile = {"channel": [1, columns], "block": args.get("block_structure"), "tensor": [rows, columns]}[str(args.get("strategy"))]
    if not (isinstance(tile, list) and len(tile) == 2 and all(type(n) is int and n > 0 for n in tile)):
        raise FormatError("a block must be two numbers", where=f"{place.base.folder}, block_structure", found=repr(tile)[:80])
    return tiled(place, "weight", "weight_scale", tile)


class _Form(NamedTuple):
    """Bits of a code, columns, whether codes lie in words, and the rows that share a scale."""

    bits: int
    columns: int
    packed: bool
    tall: int

    @property
    def half(self) -> int:
        """What is added to a packed code."""
        return 1 << self.bits - 1

    def scales(self, rows: slice) -> slice:
        return slice(rows.start // self.tall, -(-rows.stop // self.tall))

    def words(self, rows: slice) -> slice:
        return slice(rows.start * self.bits // 32, -(-rows.stop * self.bits // 32))


def _integers(place: Place, args: Mapping[str, Any], packed: bool) -> Weight:
    base, width = place.base, args.get("num_bits")
    if type(width) is not int or width not in ((2, 4, 8) if packed else (8,)):
        raise unreadable(place.codec, base, "num_bits", width, "4 or 8")
    if place.has("weight_g_idx"):
        raise unreadable(place.codec, base, "groups that are no neighbours", f"{place.path}.weight_g_idx")
    parts = {}
    if packed:
        parts["shape"] = place.part("weight_shape", ("I64", "I32"), (2,))
        rows, columns = (int(n) for n in base.read(parts["shape"]))
        if not 0 < rows < 1 << 32 or not 0 < columns < 1 << 32:
            raise FormatError("a shape that no weight has", where=f"{base.folder}, {parts['shape']}", found=[rows, columns])
        parts["codes"] = place.part("weight_packed", ("I32",), (rows, -(-columns * width // 32)))
    else:
        parts["codes"] = place.part("weight", ("I8",), (None, None))
        rows, columns = base.stored[parts["codes"]].shape
    groups = place.shape("weight_scale") if place.has("weight_scale") else ()
    tall = 1 if groups and groups[0] == rows else rows
    count = groups[1] if len(groups) == 2 else 1
    parts["scale"] = place.part("weight_scale", _SCALES, (rows // tall, *groups[1:]) if tall == 1 else (1,) * len(groups))
    if not count or columns % count:
        raise FormatError("the scales do not fit the weight", where=f"{base.folder}, {parts['scale']}", found=list(groups),
                          expected=f"{rows} rows, and a divisor of {columns} columns")
    form = _Form(width, columns, packed, tall)
    moves = None
    if place.has("weight_zero_point"):
        shape = (-(-rows * width // 32), count) if packed else (rows // tall, *groups[1:])
        parts["zero"] = place.part("weight_zero_point", ("I32",) if packed else ("I8",), shape)
        if packed and tall != 1:
            raise unreadable(place.codec, base, "one zero point for all rows", parts["zero"])
        moves = (-form.half, form.half - 1)
    settle = rounded(DTYPES[base.stored[parts["scale"]].dtype])
    step = max(tall, 32 // width if packed and moves else 1)
    return Weight(place.codec, f"{place.path}.weight", (rows, columns), base.stored[parts["scale"]].dtype, parts,
                  Grid(integers(-form.half, form.half - 1, np.int8, moves), Groups(columns // count, tall)), partial(_unpack, form),
                  partial(_pack, form), lambda _, __, *fitted: settle(*fitted), step)


def _unpack(form: _Form, parts: Parts, rows: slice) -> Coded:
    at, codes, zero = form.scales(rows), parts["codes"][rows], None
    if form.packed:
        codes = (bits.unpack(codes, form.bits, form.columns).astype(np.int16) - form.half).astype(np.int8)
    if "zero" in parts:
        zero = parts["zero"][at].reshape(at.stop - at.start, -1).astype(np.float32) if not form.packed else \
            bits.unpack(parts["zero"][form.words(rows)].T, form.bits, rows.stop - rows.start).T.astype(np.float32) - form.half
    scales = parts["scale"] if parts["scale"].ndim == 2 else parts["scale"].reshape(-1, 1)
    return Coded(codes, scales[at].astype(np.float32), zero)


def _pack(form: _Form, parts: Parts, rows: slice, coded: Coded) -> list[Piece]:
    at, codes = form.scales(rows), coded.codes
    if form.packed:
        codes = bits.pack(codes.astype(np.int16) + form.half, form.bits)
    made = [Piece("codes", rows, codes), Piece("scale", at, coded.scale.astype(parts["scale"].dtype))]
    if coded.zero is None:
        return made
    if not form.packed:
        return [*made, Piece("zero", at, coded.zero.astype(np.int8))]
    return [*made, Piece("zero", form.words(rows), bits.pack(coded.zero.T.astype(np.int16) + form.half, form.bits).T)]
