"""Reads and writes GPTQ weights as stored by AutoGPTQ and GPTQModel (arXiv 2210.17323): ``scale[g] * (code -
zero[g])``, 2 to 8 bits.

``qweight`` packs the codes of one output along the inputs, ``qzeros`` the zero points of one group along the
outputs. ``g_idx`` is the group of each input: with ``desc_act`` the inputs of a group are not adjacent.
Version 1 of the format stores zero points minus one.
"""

from __future__ import annotations

import math

import numpy as np

from ...errors import FormatError
from ...io import Config
from .. import Checkpoint
from ..quantization import settings
from .base import SCALES, WORDS, Codec, ModuleTensors, Weight, modules_with, unreadable
from .grid import Grid, Groups, fixed_zero, integers
from .layout import CodeLayout, PartLayout
from .registry import CODECS

_VERSIONS = {"gptq": 1, "gptq_v2": 0}
"""Maps ``checkpoint_format`` to what storing subtracts from a zero point."""


def match(base: Checkpoint) -> list[Weight]:
    """Returns the weights of modules with a ``qweight``."""
    config = settings(base.config)
    width = config.get("bits")
    version = config.get("checkpoint_format") or "gptq"
    if width not in (2, 3, 4, 8):
        raise unreadable("gptq", base, "bits", width, "2, 3, 4 or 8")
    if version not in _VERSIONS:
        raise unreadable("gptq", base, "checkpoint_format", version, " or ".join(_VERSIONS))
    return [
        _weight(module, config, width, _VERSIONS[version])
        for module in modules_with(base, "gptq", ".qweight")
    ]


def _weight(module: ModuleTensors, config: Config, width: int, zero_offset: int) -> Weight:
    """Returns the weight of one module, after checking the shapes of its parts."""
    codes = module.part("qweight", WORDS, (None, None))
    words, rows = module.shape("qweight")
    columns = words * 32 // width
    period = math.lcm(width, 32) // width
    scales = module.part("scales", SCALES, (None, rows))
    groups, _ = module.shape("scales")
    if not rows or not groups or columns * width != words * 32 or rows % period:
        raise FormatError(
            "the packed weight has a shape that it cannot have",
            where=f"{module.base.folder}, {codes}",
            found=[words, rows],
            expected=f"outputs and inputs in multiples of {period}",
        )
    zeros = module.part("qzeros", WORDS, (groups, rows * width // 32))
    parts = {"codes": codes, "scale": scales, "zero": zeros}
    if module.has("g_idx"):
        parts["groups"] = module.part("g_idx", ("I32", "I64"), (columns,))
    top = (1 << width) - 1
    # A zero point of 0 stored as -1 would borrow from its neighbour in the word, so exclude it.
    levels = integers(0, top, np.uint8, (zero_offset, top))
    if config.get("sym", True):
        levels = fixed_zero(levels, 1 << width - 1)
    layout = CodeLayout(
        PartLayout(turned=True, bits=width, columns=columns),
        PartLayout(turned=True),
        PartLayout(turned=True, bits=width, added=zero_offset),
    )
    grid = Grid(levels, _groups(module, config, columns, groups))
    return layout.weight(module, (rows, columns), module.dtype("scales"), parts, grid, period)


def _groups(module: ModuleTensors, config: Config, columns: int, count: int) -> Groups:
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


CODECS.register(Codec("gptq", "2, 3, 4 and 8 bits, with and without act-order", match))
