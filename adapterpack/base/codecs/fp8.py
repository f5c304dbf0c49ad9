"""Reads and writes float8 weights with a scale for each tile, as in DeepSeek-V3 and transformers' ``fp8``
(arXiv 2412.19437, section 3.3).

Stored values are multiplied by ``weight_scale_inv``, which has one number for each tile of
``weight_block_size``, or one for all.
"""

from __future__ import annotations

import numpy as np

from ...errors import FormatError
from ...io.safetensors import DTYPES
from ..checkpoint import Checkpoint
from ..quantization import settings
from .base import Codec, ModuleTensors, Parts, Weight, modules_with
from .grid import Grid, Groups, QuantizedRows, rounded, small_floats
from .registry import CODECS
from .storage import PartUpdate

GREATEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
"""The largest finite number of each dtype."""
LEVELS = {name: small_floats(DTYPES[name], GREATEST[name]) for name in GREATEST}
_SCALES = ("F32", "BF16", "F16")


def match(base: Checkpoint) -> list[Weight]:
    """Returns the weights of modules with a ``weight_scale_inv``."""
    tile = settings(base.config).get("weight_block_size")
    if tile is not None and not (
        isinstance(tile, list) and len(tile) == 2 and all(type(n) is int and n > 0 for n in tile)
    ):
        raise FormatError(
            "a tile must be two numbers", where=f"{base.folder}, weight_block_size", found=repr(tile)[:80]
        )
    return [
        tile_weight(module, "weight", "weight_scale_inv", tile)
        for module in modules_with(base, "fp8", ".weight_scale_inv")
    ]


def tile_weight(module: ModuleTensors, weight: str, scale: str, tile: list[int] | None) -> Weight:
    """Returns a float8 weight with a scale for each ``tile``, or one for all."""
    codes = module.part(weight, tuple(LEVELS), (None, None))
    rows, columns = module.base.stored[codes].shape
    height, wide = tile or (rows, columns)
    # A weight smaller than a tile has a single, smaller tile.
    height, wide = min(height, rows), min(wide, columns)
    shape = module.shape(scale) if module.has(scale) else ()
    grid_shape = (-(-rows // max(1, height)), -(-columns // max(1, wide)))
    scales = module.part(scale, _SCALES, grid_shape if len(shape) == 2 else (1,) * len(shape))
    if int(np.prod(shape)) != grid_shape[0] * grid_shape[1]:
        raise FormatError(
            "the scales do not fit the tiles",
            where=f"{module.base.folder}, {scales}",
            expected=list(grid_shape),
            found=list(shape),
        )
    dtype = module.base.stored[scales].dtype
    round_scales = rounded(DTYPES[dtype])

    def unpack(parts: Parts, at: slice) -> QuantizedRows:
        tiles = slice(at.start // height, -(-at.stop // height))
        return QuantizedRows(parts["codes"][at], parts["scale"].reshape(grid_shape)[tiles].astype(np.float32))

    def pack(parts: Parts, at: slice, quantized: QuantizedRows) -> list[PartUpdate]:
        tiles = slice(at.start // height, -(-at.stop // height))
        stored = quantized.scale.astype(parts["scale"].dtype)
        return [PartUpdate("codes", at, quantized.codes), PartUpdate("scale", tiles, stored)]

    return Weight(
        module.codec,
        f"{module.path}.weight",
        (rows, columns),
        "BF16",
        {"codes": codes, "scale": scales},
        Grid(LEVELS[module.base.stored[codes].dtype], Groups(wide, height)),
        unpack,
        pack,
        lambda _, __, *fitted: round_scales(*fitted),
        height,
    )


CODECS.register(Codec("fp8", "float8 in tiles", match))
