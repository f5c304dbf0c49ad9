"""bitsandbytes in 8 bits (LLM.int8, arXiv 2208.07339): a signed byte for each value and a scale for each row, ``code * SCB / 127``."""

from __future__ import annotations

import numpy as np

from ...errors import FormatError
from ..checkpoint import Checkpoint
from .base import Parts, Place, Weight, places, unreadable
from .grid import Coded, Grid, Groups, integers
from .storage import Piece

_UNIT = np.float32(1 / 127)
_BYTES = integers(-127, 127, np.int8)
LEVELS = _BYTES._replace(value=lambda codes: codes.astype(np.float32) * _UNIT, nearest=lambda level: _BYTES.nearest(level * 127),
                         fit=lambda low, high: (np.maximum(np.abs(low), np.abs(high)), None), width=lambda codes: np.full((1, 1), _UNIT))


def find(base: Checkpoint) -> list[Weight]:
    """The weights that have an ``SCB``."""
    return [_weight(place) for place in places(base, "bitsandbytes int8", ".SCB")]


def _weight(place: Place) -> Weight:
    base, codes = place.base, place.part("weight", ("I8",), (None, None))
    rows, columns = base.stored[codes].shape
    parts = {"codes": codes, "scale": place.part("SCB", ("F32",), (rows,))}
    if place.has("weight_format"):
        parts["format"] = place.part("weight_format", ("U8",), ())
        if int(base.read(parts["format"])) != 0:
            raise unreadable(place.codec, base, "its rows are not stored one after the other", parts["format"], "weight_format 0")
    if not rows or not columns:
        raise FormatError("an empty weight", where=f"{base.folder}, {codes}")
    return Weight(place.codec, codes, (rows, columns), "F32", parts, Grid(LEVELS, Groups(columns)),
                  lambda stored, at: Coded(stored["codes"][at], stored["scale"][at, None]), _pack, lambda stored, at, *fitted: fitted)


def _pack(parts: Parts, rows: slice, coded: Coded) -> list[Piece]:
    return [Piece("codes", rows, coded.codes), Piece("scale", rows, coded.scale[:, 0])]
