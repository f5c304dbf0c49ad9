"""torchao as transformers saves it: ``_weight_qdata``, ``_weight_scale``, ``_weight_zero_point``; the metadata of the file says what class
of tensor they make up. Integers are ``scale * (code - zero)``, float8 is ``scale * code``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ...errors import FormatError
from ...io import strict_json
from ...io.safetensors import DTYPES
from ..checkpoint import Checkpoint
from .base import Parts, Place, Weight, places, unreadable
from .fp8 import LEVELS
from .grid import Coded, Grid, Groups, Levels, fixed_zero, integers, rounded
from .storage import Piece

_CODES = "_weight_qdata"
_SCALES = ("F32", "BF16", "F16")
_MAX_TEXT = 1 << 16
_BITS = {f"int{n}": n for n in range(1, 9)}
_INTEGERS = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
_FLOATS = ("Float8Tensor",)


def find(base: Checkpoint) -> list[Weight]:
    """The weights that have a ``_weight_qdata``."""
    odd = [name for name in base.stored if name.endswith((":qdata", ":int_data"))]
    if odd:
        raise unreadable("torchao", base, "tensors flattened by another writer", odd[0], f"names that end with {_CODES}")
    return [_weight(place) for place in places(base, "torchao", f".{_CODES}")]


def _weight(place: Place) -> Weight:
    base, name = place.base, f"{place.path}.weight"
    kind, data = _class(place, name)
    if kind not in _INTEGERS + _FLOATS:
        raise unreadable("torchao", base, f"the class of {name}", kind, ", ".join(_INTEGERS + _FLOATS))
    codes = place.part(_CODES, ("I8",) if kind in _INTEGERS else tuple(LEVELS), (None, None))
    rows, columns = base.stored[codes].shape
    block = data.get("block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)) or rows % block[0] or \
            columns % block[1]:
        raise FormatError("a block size that the weight does not have", where=f"{base.folder}, {name}", found=repr(block)[:80],
                          expected=f"divisors of {[rows, columns]}")
    tall, wide = block
    scales = place.part("_weight_scale", _SCALES, (rows // tall, columns // wide))
    parts, dtype = {"codes": codes, "scale": scales}, base.stored[scales].dtype
    levels = LEVELS[base.stored[codes].dtype] if kind in _FLOATS else _integers(place, name, data)
    if kind in _INTEGERS and place.has("_weight_zero_point"):
        parts["zero"] = place.part("_weight_zero_point", ("I8", "I32", "F32"), (rows // tall, columns // wide))
        if np.any(base.read(parts["zero"])):
            low, high = _range(place, name, data)
            levels = integers(low, high, np.int8, (low, high))
    settle = rounded(DTYPES[dtype])
    return Weight("torchao", name, (rows, columns), dtype, parts, Grid(levels, Groups(wide, tall)), partial(_unpack, tall),
                  partial(_pack, tall), lambda _, __, *fitted: settle(*fitted), tall)


def _class(place: Place, name: str) -> tuple[str, Mapping[str, Any]]:
    file = place.base.files[place.base.shard_of[f"{place.path}.{_CODES}"]]
    text = file.metadata.get(name)
    if text is None:
        raise FormatError("the file does not say what class of tensor this is", where=f"{file.path}, {name}",
                          expected="metadata of torchao")
    found = strict_json.loads(text.encode(), f"{file.path}, {name}", _MAX_TEXT)
    data = found.get("_data")
    return str(found.get("_type")), data if isinstance(data, dict) else {}


def _range(place: Place, name: str, data: Mapping[str, Any]) -> tuple[int, int]:
    target = data.get("target_dtype")
    kind = target.get("_data", "int8") if isinstance(target, dict) else "int8"
    if kind not in _BITS:
        raise unreadable("torchao", place.base, f"the codes of {name}", repr(kind)[:80], ", ".join(_BITS))
    half = 1 << _BITS[kind] - 1
    return -half, half - 1


def _integers(place: Place, name: str, data: Mapping[str, Any]) -> Levels:
    """Codes whose zero points are all zero, and stay so."""
    low, high = _range(place, name, data)
    return fixed_zero(integers(low, high, np.int8), low, high, 0) if place.has("_weight_zero_point") else integers(low, high, np.int8)


def _unpack(tall: int, parts: Parts, rows: slice) -> Coded:
    at = slice(rows.start // tall, math.ceil(rows.stop / tall))
    zero = parts["zero"][at].astype(np.float32) if "zero" in parts else None
    return Coded(parts["codes"][rows], parts["scale"][at].astype(np.float32), zero)


def _pack(tall: int, parts: Parts, rows: slice, coded: Coded) -> list[Piece]:
    at = slice(rows.start // tall, math.ceil(rows.stop / tall))
    made = [Piece("codes", rows, coded.codes), Piece("scale", at, coded.scale.astype(parts["scale"].dtype))]
    return made if coded.zero is None else [*made, Piece("zero", at, coded.zero.astype(parts["zero"].dtype))]
