"""Reads and writes GPTQ weights as stored by AutoGPTQ and GPTQModel (arXiv 2210.17323): ``scale[g] * (code -
zero[g])``, 2 to 8 bits.

``qweight`` packs the codes of one output along the inputs, ``qzeros`` the zero points of one group along the
outputs. ``g_idx`` is the group of each input: with ``desc_act`` the inputs of a group are not adjacent.
Version 1 of the format stores zero points minus one.
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
from .base import Codec, ModuleTensors, Parts, Weight, modules_with, unreadable
from .grid import Grid, Groups, QuantizedRows, fixed_zero, integers, rounded
from .registry import CODECS
from .storage import PartUpdate

_VERSIONS = {"gptq": 1, "gptq_v2": 0}
"""Maps ``checkpoint_format`` to what storing subtracts from a zero point."""


class _Layout(NamedTuple):
    """Bits per code, outputs, inputs, and what storing subtracts from a zero point."""

    bits: int
    rows: int
    columns: int
    zero_offset: int


def match(base: Checkpoint) -> list[Weight]:
    """Returns the weights of modules with a ``qweight``."""
    config = settings(base.config)
    width, version = config.get("bits"), config.get("checkpoint_format") or "gptq"
    if width not in (2, 3, 4, 8):
        raise unreadable("gptq", base, "bits", width, "2, 3, 4 or 8")
    if version not in _VERSIONS:
        raise unreadable("gptq", base, "checkpoint_format", version, " or ".join(_VERSIONS))
    return [
        _weight(module, config, width, _VERSIONS[version])
        for module in modules_with(base, "gptq", ".qweight")
    ]


def _weight(module: ModuleTensors, config: Mapping[str, Any], width: int, zero_offset: int) -> Weight:
    """Returns the weight of one module, after checking the shapes of its parts."""
    base, codes = module.base, module.part("qweight", ("I32", "U32"), (None, None))
    words, rows = base.stored[codes].shape
    columns, period = words * 32 // width, 32 if width == 3 else 32 // width
    scales = module.part("scales", ("F16", "BF16", "F32"), (None, rows))
    groups, dtype = base.stored[scales].shape[0], base.stored[scales].dtype
    if not rows or not groups or columns * width != words * 32 or rows % period:
        raise FormatError(
            "the packed weight has a shape that it cannot have",
            where=f"{base.folder}, {codes}",
            found=[words, rows],
            expected=f"outputs and inputs in multiples of {period}",
        )
    parts = {
        "codes": codes,
        "scale": scales,
        "zero": module.part("qzeros", ("I32", "U32"), (groups, rows * width // 32)),
    }
    if module.has("g_idx"):
        parts["groups"] = module.part("g_idx", ("I32", "I64"), (columns,))
    top = (1 << width) - 1
    # A zero point of 0 stored as -1 would borrow from its neighbour in the word, so exclude it.
    levels = integers(0, top, np.uint8, (zero_offset, top))
    if config.get("sym", True):
        levels = fixed_zero(levels, 0, top, 1 << width - 1)
    layout, round_scales = _Layout(width, rows, columns, zero_offset), rounded(DTYPES[dtype])
    return Weight(
        "gptq",
        f"{module.path}.weight",
        (rows, columns),
        dtype,
        parts,
        Grid(levels, _groups(module, config, columns, groups)),
        partial(_unpack, layout),
        partial(_pack, layout),
        lambda _, __, *fitted: round_scales(*fitted),
        period,
    )


def _groups(module: ModuleTensors, config: Mapping[str, Any], columns: int, count: int) -> Groups:
    """Returns which inputs share a scale; raises if the stored groups contradict the config."""
    size = config.get("group_size")
    width = columns if size in (None, -1) else size
    if type(width) is not int or width < 1 or -(-columns // width) != count:
        raise FormatError(
            "the scales do not fit the group size",
            where=f"{module.base.folder}, {module.path}.scales",
            found=f"{count} groups",
            expected=f"groups of {width} in {columns} inputs",
            remedy="check quantization_config in config.json",
        )
    plain = np.arange(columns) // width
    index = np.array(module.base.read(f"{module.path}.g_idx")) if module.has("g_idx") else plain
    if np.array_equal(index, plain):
        return Groups(width)
    if not np.array_equal(np.unique(index), np.arange(count)):
        raise FormatError(
            "an input belongs to a group that there is not, or a group has no input",
            expected=f"0 to {count - 1}, each",
            where=f"{module.base.folder}, {module.path}.g_idx",
        )
    return Groups(width, members=index)


def _unpack(layout: _Layout, parts: Parts, rows: slice) -> QuantizedRows:
    """Reads the codes, scales and zero points of rows."""
    codes = packed_bits.unpack(parts["codes"][:, rows].T, layout.bits, layout.columns)
    zeros = packed_bits.unpack(parts["zero"][:, _words(layout, rows)], layout.bits, rows.stop - rows.start)
    zeros = zeros + np.uint8(layout.zero_offset) & np.uint8((1 << layout.bits) - 1)
    return QuantizedRows(codes, parts["scale"][:, rows].T.astype(np.float32), zeros.T.astype(np.float32))


def _pack(layout: _Layout, parts: Parts, rows: slice, quantized: QuantizedRows) -> list[PartUpdate]:
    """Returns the updates that store quantized rows."""
    assert quantized.zero is not None
    zeros = quantized.zero.T.astype(np.int64) - layout.zero_offset & (1 << layout.bits) - 1
    every = slice(0, len(quantized.scale.T))
    return [
        PartUpdate(
            "codes", slice(0, len(parts["codes"])), packed_bits.pack(quantized.codes, layout.bits).T, rows
        ),
        PartUpdate("scale", every, quantized.scale.T.astype(parts["scale"].dtype), rows),
        PartUpdate("zero", every, packed_bits.pack(zeros, layout.bits), _words(layout, rows)),
    ]


def _words(layout: _Layout, rows: slice) -> slice:
    """Returns the words of zero points that belong to these rows."""
    return slice(rows.start * layout.bits // 32, -(-rows.stop * layout.bits // 32))


CODECS.register(Codec("gptq", "2, 3, 4 and 8 bits, with and without act-order", match))
