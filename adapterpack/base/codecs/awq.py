"""Reads and writes AWQ weights in the layout of AutoAWQ's GEMM kernels (arXiv 2306.00978): ``scale[g] * (code
- zero[g])``, 4 bits, eight outputs per word.
"""

from __future__ import annotations

import numpy as np

from ...errors import FormatError
from ...io.safetensors import DTYPES
from ..checkpoint import Checkpoint
from ..quantization import settings
from . import bits
from .base import Codec, ModuleTensors, Parts, Weight, modules_with, unreadable
from .grid import Grid, Groups, QuantizedRows, fixed_zero, integers, rounded
from .registry import CODECS
from .storage import PartUpdate

_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
"""Position i of a word holds the code of the ``_ORDER[i]``-th of eight outputs."""
_POSITION = np.argsort(_ORDER)


def match(base: Checkpoint) -> list[Weight]:
    """Returns the weights of modules with a ``qweight``."""
    config = settings(base.config)
    width, version = config.get("bits", config.get("w_bit")), str(config.get("version", "gemm")).lower()
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
    base, codes = module.base, module.part("qweight", ("I32", "U32"), (None, None))
    columns, words = base.stored[codes].shape
    rows = words * 8
    scales = module.part("scales", ("F16", "BF16", "F32"), (None, rows))
    groups, dtype = base.stored[scales].shape[0], base.stored[scales].dtype
    if not rows or not groups or columns % groups:
        raise FormatError(
            "the scales do not fit the weight",
            where=f"{base.folder}, {scales}",
            found=f"{groups} groups",
            expected=f"a divisor of {columns} inputs",
        )
    parts = {"codes": codes, "scale": scales, "zero": module.part("qzeros", ("I32", "U32"), (groups, words))}
    levels, round_scales = integers(0, 15, np.uint8, (0, 15)), rounded(DTYPES[dtype])
    return Weight(
        "awq",
        f"{module.path}.weight",
        (rows, columns),
        dtype,
        parts,
        Grid(levels if asymmetric else fixed_zero(levels, 0, 15, 8), Groups(columns // groups)),
        _unpack,
        _pack,
        lambda _, __, *fitted: round_scales(*fitted),
        8,
    )


def _unpack(parts: Parts, rows: slice) -> QuantizedRows:
    """Reads the codes, scales and zero points of rows."""
    at, count = _words(rows), rows.stop - rows.start
    return QuantizedRows(
        _unpack_words(parts["codes"][:, at], count),
        parts["scale"][:, rows].T.astype(np.float32),
        _unpack_words(parts["zero"][:, at], count).astype(np.float32),
    )


def _pack(parts: Parts, rows: slice, quantized: QuantizedRows) -> list[PartUpdate]:
    """Returns the updates that store quantized rows."""
    assert quantized.zero is not None
    at = _words(rows)
    return [
        PartUpdate("codes", slice(0, len(parts["codes"])), _pack_words(quantized.codes), at),
        PartUpdate(
            "scale", slice(0, len(parts["scale"])), quantized.scale.T.astype(parts["scale"].dtype), rows
        ),
        PartUpdate("zero", slice(0, len(parts["zero"])), _pack_words(quantized.zero.astype(np.uint8)), at),
    ]


def _words(rows: slice) -> slice:
    """Returns the words that hold these outputs."""
    return slice(rows.start // 8, rows.stop // 8)


def _unpack_words(words: np.ndarray, count: int) -> np.ndarray:
    """Returns codes ``[outputs, n]`` from words ``[n, outputs / 8]``."""
    codes = bits.unpack(words, 4, count).reshape(len(words), -1, 8)
    return np.ascontiguousarray(codes[:, :, _POSITION].reshape(len(words), count).T)


def _pack_words(codes: np.ndarray) -> np.ndarray:
    """Returns words ``[n, outputs / 8]`` from codes ``[outputs, n]``."""
    placed = codes.T.reshape(codes.shape[1], -1, 8)[:, :, _ORDER]
    return bits.pack(placed.reshape(codes.shape[1], -1), 4)


CODECS.register(Codec("awq", "4 bits, GEMM packing", match))
