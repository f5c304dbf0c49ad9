"""Float8 weights with a scale for each tile, as DeepSeek-V3 and transformers' ``fp8`` store them (arXiv 2412.19437, section 3.3).

``weight_scale_inv`` holds one number for each tile of ``weight_block_size``, or one for all, by which the stored weight is multiplied.
"""

from __future__ import annotations

import numpy as np

from ...errors import FormatError
from ...io.safetensors import DTYPES
from ..checkpoint import Checkpoint
from ..quantization import settings
from .base import Parts, Place, Weight, places
from .grid import Coded, Grid, Groups, rounded, small_floats
from .storage import Piece

GREATEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
"""The greatest finite number of each dtype."""
LEVELS = {name: small_floats(DTYPES[name], GREATEST[name]) for name in GREATEST}
_SCALES = ("F32", "BF16", "F16")


def find(base: Checkpoint) -> list[Weight]:
    """The weights that have a ``weight_scale_inv``."""
    tile = settings(base.config).get("weight_block_size")
    if tile is not None and not (isinstance(tile, list) and len(tile) == 2 and all(type(n) is int and n > 0 for n in tile)):
        raise FormatError("a tile must be two numbers", where=f"{base.folder}, weight_block_size", found=repr(tile)[:80])
    return [tiled(place, "weight", "weight_scale_inv", tile) for place in places(base, "fp8", ".weight_scale_inv")]


def tiled(place: Place, weight: str, scale: str, tile: list[int] | None) -> Weight:
    """A float8 weight with a scale for each ``tile`` of it, or one for all."""
    codes = place.part(weight, tuple(LEVELS), (None, None))
    rows, columns = place.base.stored[codes].shape
    tall, wide = tile or (rows, columns)
    tall, wide = min(tall, rows), min(wide, columns)
    shape = place.shape(scale) if place.has(scale) else ()
    grid_shape = (-(-rows // max(1, tall)), -(-columns // max(1, wide)))
    scales = place.part(scale, _SCALES, grid_shape if len(shape) == 2 else (1,) * len(shape))
    if int(np.prod(shape)) != grid_shape[0] * grid_shape[1]:
        raise FormatError("the scales do not fit the tiles", where=f"{place.base.folder}, {scales}", expected=list(grid_shape),
                          found=list(shape))
    dtype = place.base.stored[scales].dtype
    settle = rounded(DTYPES[dtype])

    def unpack(parts: Parts, at: slice) -> Coded:
        tiles = slice(at.start // tall, -(-at.stop // tall))
        return Coded(parts["codes"][at], parts["scale"].reshape(grid_shape)[tiles].astype(np.float32))

    def pack(parts: Parts, at: slice, coded: Coded) -> list[Piece]:
        tiles = slice(at.start // tall, -(-at.stop // tall))
        stored = coded.scale.astype(parts["scale"].dtype)
        return [Piece("codes", at, coded.codes), Piece("scale", tiles, stored)]

    return Weight(place.codec, f"{place.path}.weight", (rows, columns), "BF16", {"codes": codes, "scale": scales},
                  Grid(LEVELS[place.base.stored[codes].dtype], Groups(wide, tall)), unpack, pack,
                  lambda _, __, *fitted: settle(*fitted), tall)
