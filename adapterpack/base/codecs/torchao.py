"""Reads and writes torchao weights as transformers saves them: ``_weight_qdata``, ``_weight_scale`` and
``_weight_zero_point``, with the tensor class in the metadata of the file.

Integers are ``scale * (code - zero)``, float8 is ``scale * code``.
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
from .base import Codec, ModuleTensors, Parts, Weight, modules_with, unreadable
from .fp8 import LEVELS
from .grid import Grid, Groups, Levels, QuantizedRows, fixed_zero, integers, rounded
from .registry import CODECS
from .storage import PartUpdate

_CODES = "_weight_qdata"
_SCALES = ("F32", "BF16", "F16")
_MAX_TEXT = 1 << 16
_BITS = {f"int{n}": n for n in range(1, 9)}
_INTEGERS = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
_FLOATS = ("Float8Tensor",)


def match(base: Checkpoint) -> list[Weight]:
    """Returns the weights of modules with a ``_weight_qdata``."""
    odd = [name for name in base.stored if name.endswith((":qdata", ":int_data"))]
    if odd:
        raise unreadable(
            "torchao", base, "tensors flattened by another writer", odd[0], f"names that end with {_CODES}"
        )
    return [_weight(module) for module in modules_with(base, "torchao", f".{_CODES}")]


def _weight(module: ModuleTensors) -> Weight:
    """Returns the weight of one module, after checking the shapes of its parts."""
    base, name = module.base, f"{module.path}.weight"
    kind, data = _class(module, name)
    if kind not in _INTEGERS + _FLOATS:
        raise unreadable("torchao", base, f"the class of {name}", kind, ", ".join(_INTEGERS + _FLOATS))
    codes = module.part(_CODES, ("I8",) if kind in _INTEGERS else tuple(LEVELS), (None, None))
    rows, columns = base.stored[codes].shape
    block = data.get("block_size")
    if (
        not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block))
        or rows % block[0]
        or columns % block[1]
    ):
        raise FormatError(
            "a block size that the weight does not have",
            where=f"{base.folder}, {name}",
            found=repr(block)[:80],
            expected=f"divisors of {[rows, columns]}",
        )
    height, wide = block
    scales = module.part("_weight_scale", _SCALES, (rows // height, columns // wide))
    parts, dtype = {"codes": codes, "scale": scales}, base.stored[scales].dtype
    levels = LEVELS[base.stored[codes].dtype] if kind in _FLOATS else _integers(module, name, data)
    if kind in _INTEGERS and module.has("_weight_zero_point"):
        parts["zero"] = module.part(
            "_weight_zero_point", ("I8", "I32", "F32"), (rows // height, columns // wide)
        )
        if np.any(base.read(parts["zero"])):
            low, high = _range(module, name, data)
            levels = integers(low, high, np.int8, (low, high))
    round_scales = rounded(DTYPES[dtype])
    return Weight(
        "torchao",
        name,
        (rows, columns),
        dtype,
        parts,
        Grid(levels, Groups(wide, height)),
        partial(_unpack, height),
        partial(_pack, height),
        lambda _, __, *fitted: round_scales(*fitted),
        height,
    )


def _class(module: ModuleTensors, name: str) -> tuple[str, Mapping[str, Any]]:
    """Returns the class of a weight and its attributes, from the metadata of the file."""
    file = module.base.files[module.base.shard_of[f"{module.path}.{_CODES}"]]
    text = file.metadata.get(name)
    if text is None:
        raise FormatError(
            "the file does not say what class of tensor this is",
            where=f"{file.path}, {name}",
            expected="metadata of torchao",
        )
    description = strict_json.loads(text.encode(), f"{file.path}, {name}", _MAX_TEXT)
    data = description.get("_data")
    return str(description.get("_type")), data if isinstance(data, dict) else {}


def _range(module: ModuleTensors, name: str, data: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the smallest and largest code of an integer weight."""
    target = data.get("target_dtype")
    kind = target.get("_data", "int8") if isinstance(target, dict) else "int8"
    if kind not in _BITS:
        raise unreadable("torchao", module.base, f"the codes of {name}", repr(kind)[:80], ", ".join(_BITS))
    half = 1 << _BITS[kind] - 1
    return -half, half - 1


def _integers(module: ModuleTensors, name: str, data: Mapping[str, Any]) -> Levels:
    """Returns integer levels whose zero points are zero and remain so."""
    low, high = _range(module, name, data)
    return (
        fixed_zero(integers(low, high, np.int8), low, high, 0)
        if module.has("_weight_zero_point")
        else integers(low, high, np.int8)
    )


def _unpack(height: int, parts: Parts, rows: slice) -> QuantizedRows:
    """Reads the codes, scales and zero points of rows."""
    at = slice(rows.start // height, math.ceil(rows.stop / height))
    zero = parts["zero"][at].astype(np.float32) if "zero" in parts else None
    return QuantizedRows(parts["codes"][rows], parts["scale"][at].astype(np.float32), zero)


def _pack(height: int, parts: Parts, rows: slice, quantized: QuantizedRows) -> list[PartUpdate]:
    """Returns the updates that store quantized rows."""
    at = slice(rows.start // height, math.ceil(rows.stop / height))
    updates = [
        PartUpdate("codes", rows, quantized.codes),
        PartUpdate("scale", at, quantized.scale.astype(parts["scale"].dtype)),
    ]
    return (
        updates
        if quantized.zero is None
        else [*updates, PartUpdate("zero", at, quantized.zero.astype(parts["zero"].dtype))]
    )


CODECS.register(Codec("torchao", "int8, intx unpacked to int8, float8", match))
