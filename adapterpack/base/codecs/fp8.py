"""Reads and writes float8 weights with a scale for each tile, as in DeepSeek-V3 and transformers' ``fp8``
(arXiv 2412.19437, section 3.3).

Stored values are multiplied by ``weight_scale_inv``, which has one number for each tile of
``weight_block_size``, or one for all.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...errors import FormatError, excerpt
from ...io import DTYPES
from .. import Checkpoint
from ..quantization import settings
from .base import SCALES, Codec, ModuleTensors, Weight, modules_with
from .grid import Grid, Groups, small_floats
from .layout import CodeLayout, PartLayout
from .registry import CODECS

GREATEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
"""The largest finite number of each dtype."""
LEVELS = {name: small_floats(DTYPES[name], GREATEST[name]) for name in GREATEST}


def match(base: Checkpoint) -> list[Weight]:
    """Returns the weights of modules with a ``weight_scale_inv``."""
    tile = settings(base.config).get("weight_block_size")
    if tile is not None:
        tile = tile_of(tile, f"{base.folder}, weight_block_size")
    return [
        tile_weight(module, "weight_scale_inv", tile)
        for module in modules_with(base, "fp8", ".weight_scale_inv")
    ]


def tile_of(value: Any, where: str) -> tuple[int, int]:
    """Returns the rows and columns of a tile in a configuration.

    Raises:
        FormatError: it is anything else than two numbers.
    """
    if isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value):
        return value[0], value[1]
    raise FormatError("a tile must be two numbers", where=where, found=excerpt(value))


def tile_weight(module: ModuleTensors, scale: str, tile: tuple[int, int] | None) -> Weight:
    """Returns a float8 weight with a scale for each ``tile``, or one for all."""
    codes = module.part("weight", tuple(LEVELS), (None, None))
    rows, columns = module.shape("weight")
    # A weight smaller than a tile has a single, smaller tile.
    height, wide = np.minimum(tile or (rows, columns), (rows, columns)).tolist()
    shape = module.shape(scale) if module.has(scale) else ()
    grid_shape = (-(-rows // max(1, height)), -(-columns // max(1, wide)))
    scales = module.part(scale, SCALES, grid_shape if len(shape) == 2 else (1,) * len(shape))
    if math.prod(shape) != math.prod(grid_shape):
        raise FormatError(
            "the scales do not fit the tiles",
            where=f"{module.base.folder}, {scales}",
            expected=list(grid_shape),
            found=list(shape),
        )
    layout = CodeLayout(scale=PartLayout(height))
    grid = Grid(LEVELS[module.dtype("weight")], Groups(wide, height))
    return layout.weight(module, (rows, columns), "BF16", {"codes": codes, "scale": scales}, grid, height)


CODECS.register(Codec("fp8", "float8 in tiles", match))
