"""Reads and writes torchao weights as transformers saves them: ``_weight_qdata``, ``_weight_scale`` and
``_weight_zero_point``, with the tensor class in the metadata of the file.

Integers are ``scale * (code - zero)``, float8 is ``scale * code``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...errors import FormatError, excerpt
from ...io import strict_json
from .. import Checkpoint
from .base import SCALES, Codec, ModuleTensors, Weight, modules_with, unreadable
from .fp8 import LEVELS, tile_of
from .grid import Grid, Groups, fixed_zero, integers
from .layout import CodeLayout, PartLayout
from .registry import CODECS

_CODES = "_weight_qdata"
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
    base = module.base
    name = f"{module.path}.weight"
    kind, data = _class(module, name)
    if kind not in _INTEGERS + _FLOATS:
        raise unreadable("torchao", base, f"the class of {name}", kind, ", ".join(_INTEGERS + _FLOATS))
    codes = module.part(_CODES, ("I8",) if kind in _INTEGERS else tuple(LEVELS), (None, None))
    rows, columns = module.shape(_CODES)
    height, wide = tile_of(data.get("block_size"), f"{base.folder}, {name}, block_size")
    if rows % height or columns % wide:
        raise FormatError(
            "a block size that the weight does not have",
            where=f"{base.folder}, {name}",
            found=[height, wide],
            expected=f"divisors of {[rows, columns]}",
        )
    groups = (rows // height, columns // wide)
    parts = {"codes": codes, "scale": module.part("_weight_scale", SCALES, groups)}
    if kind in _FLOATS:
        levels = LEVELS[module.dtype(_CODES)]
    else:
        low, high = _range(module, name, data)
        levels = integers(low, high, np.int8)
        if module.has("_weight_zero_point"):
            parts["zero"] = module.part("_weight_zero_point", ("I8", "I32", "F32"), groups)
            shifts = np.any(base.read(parts["zero"]))
            # Zero points that are all zero remain so.
            levels = integers(low, high, np.int8, (low, high)) if shifts else fixed_zero(levels, 0)
    layout = CodeLayout(scale=PartLayout(height), zero=PartLayout(height))
    grid = Grid(levels, Groups(wide, height))
    return layout.weight(module, (rows, columns), module.dtype("_weight_scale"), parts, grid, height)


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
        raise unreadable("torchao", module.base, f"the codes of {name}", excerpt(kind), ", ".join(_BITS))
    half = 1 << _BITS[kind] - 1
    return -half, half - 1


CODECS.register(Codec("torchao", "int8, intx unpacked to int8, float8", match))
