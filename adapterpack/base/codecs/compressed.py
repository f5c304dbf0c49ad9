"""Reads and writes compressed-tensors, llm-compressor's format: ``pack-quantized``, ``int-quantized`` and
``float-quantized`` weights.

Integers are ``scale * (code - zero)`` with codes around zero. Packed codes have half of their range added and
are packed into words along the inputs, their zero points into words along the outputs.
"""

from __future__ import annotations

import numpy as np

from ...errors import FormatError
from ...io import Config
from .. import Checkpoint
from ..quantization import settings
from .base import SCALES, Codec, ModuleTensors, Weight, modules_with, unreadable
from .fp8 import tile_of, tile_weight
from .grid import Grid, Groups, integers
from .layout import CodeLayout, PartLayout
from .registry import CODECS

_NAME = "compressed-tensors"


def match(base: Checkpoint) -> list[Weight]:
    """Returns the weights of modules with a ``weight_packed`` or a ``weight_scale``."""
    config = settings(base.config)
    groups = config.get("config_groups")
    schemes = [one for one in groups.values() if isinstance(one, dict)] if isinstance(groups, dict) else []
    arguments = [one["weights"] for one in schemes if isinstance(one.get("weights"), dict)]
    if len(arguments) != 1:
        raise unreadable(_NAME, base, "config_groups", f"{len(arguments)} schemes of weights", "one")
    args = arguments[0]
    order = arguments[0].get("actorder")
    if order not in (None, "static", "weight", False):
        raise unreadable(_NAME, base, "actorder", repr(order)[:40], "static or none")
    scaled = modules_with(base, _NAME, ".weight_scale")
    if args.get("type") == "float":
        if args.get("num_bits") != 8:
            raise unreadable(_NAME, base, "floats of so many bits", args.get("num_bits"), 8)
        return [_floats(module, args) for module in scaled]
    packed = modules_with(base, _NAME, ".weight_packed")
    return [_integers(module, args, bool(packed)) for module in packed or scaled]


def _floats(module: ModuleTensors, args: Config) -> Weight:
    """Returns a float8 weight."""
    module.part("weight", ("F8_E4M3", "F8_E5M2"), (None, None))
    strategy = args.get("strategy")
    if strategy == "tensor":
        tile = None
    elif strategy == "channel":
        tile = (1, module.shape("weight")[1])
    elif strategy == "block":
        tile = tile_of(args.get("block_structure"), f"{module.base.folder}, block_structure")
    else:
        raise unreadable(_NAME, module.base, "strategy", strategy, "tensor, channel or block")
    return tile_weight(module, "weight_scale", tile)


def _integers(module: ModuleTensors, args: Config, packed: bool) -> Weight:
    """Returns an integer weight, after checking the shapes of its parts."""
    base = module.base
    width = args.get("num_bits")
    if type(width) is not int or width not in ((2, 4, 8) if packed else (8,)):
        raise unreadable(_NAME, base, "num_bits", width, "4 or 8")
    if module.has("weight_g_idx"):
        raise unreadable(_NAME, base, "groups that are no neighbours", f"{module.path}.weight_g_idx")
    parts = {}
    if packed:
        parts["shape"] = module.part("weight_shape", ("I64", "I32"), (2,))
        rows, columns = (int(n) for n in base.read(parts["shape"]))
        if not 0 < rows < 1 << 32 or not 0 < columns < 1 << 32:
            raise FormatError(
                "a shape that no weight has", where=f"{base.folder}, {parts['shape']}", found=[rows, columns]
            )
        parts["codes"] = module.part("weight_packed", ("I32",), (rows, -(-columns * width // 32)))
    else:
        parts["codes"] = module.part("weight", ("I8",), (None, None))
        rows, columns = module.shape("weight")
    groups = module.shape("weight_scale") if module.has("weight_scale") else ()
    height = 1 if groups and groups[0] == rows else rows
    count = groups[1] if len(groups) == 2 else 1
    parts["scale"] = module.part(
        "weight_scale", SCALES, (rows // height, *groups[1:]) if height == 1 else (1,) * len(groups)
    )
    if not count or columns % count:
        raise FormatError(
            "the scales do not fit the weight",
            where=f"{base.folder}, {parts['scale']}",
            found=list(groups),
            expected=f"{rows} rows, and a divisor of {columns} columns",
        )
    half = 1 << width - 1
    zero_range = None
    if module.has("weight_zero_point"):
        shape = (-(-rows * width // 32), count) if packed else (rows // height, *groups[1:])
        parts["zero"] = module.part("weight_zero_point", ("I32",) if packed else ("I8",), shape)
        if packed and height != 1:
            raise unreadable(_NAME, base, "one zero point for all rows", parts["zero"])
        zero_range = (-half, half - 1)
    by_group = PartLayout(height)
    words = PartLayout(bits=width, added=-half)
    layout = CodeLayout(scale=by_group, zero=by_group)
    if packed:
        layout = CodeLayout(words._replace(columns=columns), by_group, words)
    grid = Grid(integers(-half, half - 1, np.int8, zero_range), Groups(columns // count, height))
    # Packed zero points share words along the outputs, so blocks of rows must contain complete words.
    step = max(height, 32 // width if packed and zero_range else 1)
    return layout.weight(module, (rows, columns), module.dtype("weight_scale"), parts, grid, step)


CODECS.register(Codec(_NAME, "packed and plain integers, float8", match))
