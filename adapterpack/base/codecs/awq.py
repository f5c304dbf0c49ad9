"""Reads and writes AWQ weights in the layout of AutoAWQ's GEMM kernels (arXiv 2306.00978): ``scale[g] * (code
- zero[g])``, 4 bits, eight outputs per word.
"""

from __future__ import annotations

import numpy as np

from ...errors import FormatError
from .. import Checkpoint
from ..quantization import settings
from .base import SCALES, WORDS, Codec, ModuleTensors, Weight, modules_with, unreadable
from .grid import Grid, Groups, fixed_zero, integers
from .layout import CodeLayout, PartLayout
from .registry import CODECS

_WORDS = PartLayout(turned=True, bits=4, order=np.array([0, 2, 4, 6, 1, 3, 5, 7]))
_LAYOUT = CodeLayout(_WORDS, PartLayout(turned=True), _WORDS)


def match(base: Checkpoint) -> list[Weight]:
    """Returns the weights of modules with a ``qweight``."""
    config = settings(base.config)
    width = config.get("bits", config.get("w_bit"))
    version = str(config.get("version", "gemm")).lower()
    if width != 4:
        raise unreadable("awq", base, "bits", width, 4)
    if version != "gemm":
        raise unreadable("awq", base, "version", version, "gemm")
    return [
        _weight(module, bool(config.get("zero_point", True)))
        for module in modules_with(base, "awq", ".qweight")
    ]


def _weight(module: ModuleTensors, asymmetric: bool) -> Weight:
    """Returns the weight of one module, after checking the shapes of its parts."""
    codes = module.part("qweight", WORDS, (None, None))
    columns, words = module.shape("qweight")
    rows = words * 8
    scales = module.part("scales", SCALES, (None, rows))
    groups, _ = module.shape("scales")
    if not rows or not groups or columns % groups:
        raise FormatError(
            "the scales do not fit the weight",
            where=f"{module.base.folder}, {scales}",
            found=f"{groups} groups",
            expected=f"a divisor of {columns} inputs",
        )
    parts = {"codes": codes, "scale": scales, "zero": module.part("qzeros", WORDS, (groups, words))}
    levels = integers(0, 15, np.uint8, (0, 15))
    grid = Grid(levels if asymmetric else fixed_zero(levels, 8), Groups(columns // groups))
    return _LAYOUT.weight(module, (rows, columns), module.dtype("scales"), parts, grid, 8)


CODECS.register(Codec("awq", "4 bits, GEMM packing", match))
