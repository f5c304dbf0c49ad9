"""GPTQ as AutoGPTQ and GPTQModel store it (arXiv 2210.17323): ``scale[g] * (code - zero[g])``, 2, 3, 4 or 8 bits.

``qweight`` packs the codes of one output along the inputs, ``qzeros`` the zero points of one group along the outputs; ``g_idx`` names the
group of each input, which with ``desc_act`` are no neighbours. The first version of the format stores zero points less one.
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
from . import bits as packed_bits
from .base import Parts, Place, Weight, places, unreadable
from .grid import Coded, Grid, Groups, fixed_zero, integers, rounded
from .storage import Piece

_VERSIONS = {"gptq": 1, "gptq_v2": 0}
"""``checkpoint_format`` -> what its zero points are stored less by."""


class _Form(NamedTuple):
    """Bits of a code, outputs, inputs, and what zero points are stored less by."""

    bits: int
    rows: int
    columns: int
    less: int


def find(base: Checkpoint) -> list[Weight]:
    """The weights that have a ``qweight``."""
    config = settings(base.config)
    width, version = config.get("bits"), config.get("checkpoint_format") or "gptq"
    if width not in (2, 3, 4, 8):
        raise unreadable("gptq", base, "bits", width, "2, 3, 4 or 8")
    if version not in _VERSIONS:
        raise unreadable("gptq", base, "checkpoint_format", version, " or ".join(_VERSIONS))
    return [_weight(place, config, width, _VERSIONS[version]) for place in places(base, "gptq", ".qweight")]


def _weight(place: Place, config: Mapping[str, Any], width: int, less: int) -> Weight:
    base, codes = place.base, place.part("qweight", ("I32", "U32"), (None, None))
    words, rows = base.stored[codes].shape
    columns, period = words * 32 // width, 32 if width == 3 else 32 // width
    scales = place.part("scales", ("F16", "BF16", "F32"), (None, rows))
    groups, dtype = base.stored[scales].shape[0], base.stored[scales].dtype
    if not rows or not groups or columns * width != words * 32 or rows % period:
        raise FormatError("the packed weight has a shape that it cannot have", where=f"{base.folder}, {codes}", found=[words, rows],
                          expected=f"outputs and inputs in multiples of {period}")
    parts = {"codes": codes, "scale": scales, "zero": place.part("qzeros", ("I32", "U32"), (groups, rows * width // 32))}
    if place.has("g_idx"):
        parts["groups"] = place.part("g_idx", ("I32", "I64"), (columns,))
    top = (1 << width) - 1
    levels = integers(0, top, np.uint8, (less, top))  # zero less one would borrow from its neighbour in the word
    if config.get("sym", True):
        levels = fixed_zero(levels, 0, top, 1 << width - 1)
    form, settle = _Form(width, rows, columns, less), rounded(DTYPES[dtype])
    return Weight("gptq", f"{place.path}.weight", (rows, columns), dtype, parts, Grid(levels, _groups(place, config, columns, groups)),
                  partial(_unpack, form), partial(_pack, form), lambda _, __, *fitted: settle(*fitted), period)


def _groups(place: Place, config: Mapping[str, Any], columns: int, count: int) -> Groups:
    size = config.get("group_size")
    width = columns if size in (None, -1) else size
    if type(width) is not int or width < 1 or -(-columns // width) != count:
        raise FormatError("the scales do not fit the group size", where=f"{place.base.folder}, {place.path}.scales",
                          found=f"{count} groups",
                          expected=f"groups of {width} in {columns} inputs", remedy="check quantization_config in config.json")
    plain = np.arange(columns) // width
    index = np.array(place.base.read(f"{place.path}.g_idx")) if place.has("g_idx") else plain
    if np.array_equal(index, plain):
        return Groups(width)
    if not np.array_equal(np.unique(index), np.arange(count)):
        raise FormatError("an input belongs to a group that there is not, or a group has no input", expected=f"0 to {count - 1}, each",
                          where=f"{place.base.folder}, {place.path}.g_idx")
    return Groups(width, members=index)


def _unpack(form: _Form, parts: Parts, rows: slice) -> Coded:
    codes = packed_bits.unpack(parts["codes"][:, rows].T, form.bits, form.columns)
    zeros = packed_bits.unpack(parts["zero"][:, _words(form, rows)], form.bits, rows.stop - rows.start)
    zeros = zeros + np.uint8(form.less) & np.uint8((1 << form.bits) - 1)
    return Coded(codes, parts["scale"][:, rows].T.astype(np.float32), zeros.T.astype(np.float32))


def _pack(form: _Form, parts: Parts, rows: slice, coded: Coded) -> list[Piece]:
    assert coded.zero is not None
    zeros = coded.zero.T.astype(np.int64) - form.less & (1 << form.bits) - 1
    every = slice(0, len(coded.scale.T))
    return [Piece("codes", slice(0, len(parts["codes"])), packed_bits.pack(coded.codes, form.bits).T, rows),
            Piece("scale", every, coded.scale.T.astype(parts["scale"].dtype), rows),
            Piece("zero", every, packed_bits.pack(zeros, form.bits), _words(form, rows))]


def _words(form: _Form, rows: slice) -> slice:
    return slice(rows.start * form.bits // 32, -(-rows.stop * form.bits // 32))
