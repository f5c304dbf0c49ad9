"""A quantized format in one file: optimum-quanto's int8 weights, which `merge` then reads, folds adapters
into and writes back.

quanto stores a weight as signed bytes `weight._data` and one scale for each row, `weight._scale`. A package
of yours brings its format by an entry point, named as `quant_method` in config.json:
[project.entry-points."adapterpack.codecs"] quanto = "new_codec:quanto".
"""

import numpy as np

from adapterpack.base.codecs.base import Codec, ModuleTensors, Weight, modules_with
from adapterpack.base.codecs.grid import Grid, Groups, QuantizedRows, integers, rounded
from adapterpack.base.codecs.registry import CODECS
from adapterpack.base.codecs.storage import PartUpdate
from adapterpack.io.safetensors import DTYPES

LEVELS = integers(-127, 127, np.int8)


def match(base):
    """The weights of modules with a `weight._data`."""
    return [weight(module) for module in modules_with(base, "quanto", ".weight._data")]


def weight(module: ModuleTensors) -> Weight:
    """How rows are decoded (`scale * code`) and stored again; the grid finds codes and scales of changed
    values.
    """
    codes = module.part("weight._data", ("I8",), (None, None))
    rows, columns = module.base.stored[codes].shape
    scales = module.part("weight._scale", ("F32", "BF16", "F16"), (rows, 1))
    dtype = module.base.stored[scales].dtype
    to_stored = rounded(DTYPES[dtype])

    def unpack(parts, at):
        return QuantizedRows(parts["codes"][at], parts["scale"][at].astype(np.float32))

    def pack(parts, at, quantized):
        return [
            PartUpdate("codes", at, quantized.codes),
            PartUpdate("scale", at, quantized.scale.astype(parts["scale"].dtype)),
        ]

    return Weight(
        "quanto",
        f"{module.path}.weight",
        (rows, columns),
        dtype,
        {"codes": codes, "scale": scales},
        Grid(LEVELS, Groups(columns)),
        unpack,
        pack,
        lambda parts, at, *fitted: to_stored(*fitted),
    )


quanto = CODECS.register(Codec("quanto", "int8 with a scale for each row", match))
