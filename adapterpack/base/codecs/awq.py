"""AWQ as AutoAWQ's GEMM kernels have it (arXiv 2306.00978): ``scale[g] * (code - zero[g])``, 4 bits, eight outputs in a word."""

from __future__ import annotations

import numpy as np

from ...errors import FormatError
from ...io.safetensors import DTYPES
from ..checkpoint import Checkpoint
from ..quantization import settings
from . import bits
from .base import Parts, Place, Weight, places, unreadable
from .grid import Coded, Grid, Groups, fixed_zero, integers, rounded
from .storage import Piece

_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
"""At place i of a word lies the code of output ``_ORDER[i]`` of the eight."""
_PLACE = np.argsort(_ORDER)


def find(base: Checkpoint) -> list[Weight]:
    """The weights that have a ``qweight``."""
    config = settings(base.config)
    width, version = config.get("bits", config.get("w_bit")), str(config.get("version", "gemm")).lower()
    if width != 4:
        raise unreadable("awq", base, "bits", width, 4)
    if version != "gemm":
        raise unreadable("awq", base, "version", version, "gemm")
    return [_weight(place, bool(config.get("zero_point", True))) for place in places(base, "awq", ".qweight")]


def _weight(place: Place, moves: bool) -> Weight:
    base, codes = place.base, place.part("qweight", ("I32", "U32"), (None, None))
    columns, words = base.stored[codes].shape
    rows = words * 8
    scales = place.part("scales", ("F16", "BF16", "F32"), (None, rows))
    groups, dtype = base.stored[scales].shape[0], base.stored[scales].dtype
    if not rows or not groups or columns % groups:
        raise FormatError("the scales do not fit the weight", where=f"{base.folder}, {scales}", found=f"{groups} groups",
                          expected=f"a divisor of {columns} inputs")
    parts = {"codes": codes, "scale": scales, "zero": place.part("qzeros", ("I32", "U32"), (groups, words))}
    levels, settle = integers(0, 15, np.uint8, (0, 15)), rounded(DTYPES[dtype])
    return Weight("awq", f"{place.path}.weight", (rows, columns), dtype, parts,
                  Grid(levels if moves else fixed_zero(levels, 0, 15, 8), Groups(columns // groups)),
                  _unpack, _pack, lambda _, __, *fitted: settle(*fitted), 8)


def _unpack(parts: Parts, rows: slice) -> Coded:
    at, count = _words(rows), rows.stop - rows.start
    return Coded(_opened(parts["codes"][:, at], count), parts["scale"][:, rows].T.astype(np.float32),
                 _opened(parts["zero"][:, at], count).astype(np.float32))


def _pack(parts: Parts, rows: slice, coded: Coded) -> list[Piece]:
    assert coded.zero is not None
    at = _words(rows)
    return [Piece("codes", slice(0, len(parts["codes"])), _closed(coded.codes), at),
            Piece("scale", slice(0, len(parts["scale"])), coded.scale.T.astype(parts["scale"].dtype), rows),
            Piece("zero", slice(0, len(parts["zero"])), _closed(coded.zero.astype(np.uint8)), at)]


def _words(rows: slice) -> slice:
    return slice(rows.start // 8, rows.stop // 8)


def _opened(words: np.ndarray, count: int) -> np.ndarray:
    """Codes ``[outputs, n]`` of words ``[n, outputs / 8]``."""
    codes = bits.unpack(words, 4, count).reshape(len(words), -1, 8)
    return np.ascontiguousarray(codes[:, :, _PLACE].reshape(len(words), count).T)


def _closed(codes: np.ndarray) -> np.ndarray:
    placed = codes.T.reshape(codes.shape[1], -1, 8)[:, :, _ORDER]
    return bits.pack(placed.reshape(codes.shape[1], -1), 4)
