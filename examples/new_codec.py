"""A quantized format in one file: optimum-quanto's int8 weights, which `merge` then reads, folds adapters
into and writes back.

quanto stores a weight as signed bytes `weight._data` and one scale for each row, `weight._scale`. A package
of yours brings its format by an entry point, named as `quant_method` in config.json:
[project.entry-points."adapterpack.codecs"] quanto = "new_codec:quanto".
"""

import numpy as np

from adapterpack.base.codecs.base import SCALES, Codec, ModuleTensors, Weight, modules_with
from adapterpack.base.codecs.grid import Grid, Groups, integers
from adapterpack.base.codecs.layout import CodeLayout
from adapterpack.base.codecs.registry import CODECS

LEVELS = integers(-127, 127, np.int8)


def match(base):
    """The weights of modules with a `weight._data`."""
    return [weight(module) for module in modules_with(base, "quanto", ".weight._data")]


def weight(module: ModuleTensors) -> Weight:
    """Which tensors hold codes and scales (`scale * code`); the grid finds those of changed values. A
    `CodeLayout` says how they are stored, here each number as an element.
    """
    codes = module.part("weight._data", ("I8",), (None, None))
    rows, columns = module.shape("weight._data")
    parts = {"codes": codes, "scale": module.part("weight._scale", SCALES, (rows, 1))}
    grid = Grid(LEVELS, Groups(columns))
    return CodeLayout().weight(module, (rows, columns), module.dtype("weight._scale"), parts, grid)


quanto = CODECS.register(Codec("quanto", "int8 with a scale for each row", match))
