"""Reads and writes bitsandbytes weights: int8 here, 4 bits in :mod:`.bnb4`; a checkpoint may contain both.

In 8 bits (LLM.int8, arXiv 2208.07339) a value is a signed byte and each row has a scale: ``code * SCB /
127``.
"""

from __future__ import annotations

import numpy as np

from ...errors import FormatError
from .. import Checkpoint
from . import bnb4
from .base import Codec, ModuleTensors, Weight, modules_with, unreadable
from .grid import CodeSpan, Grid, Groups, fit_magnitude, integers
from .layout import CodeLayout
from .registry import CODECS

_UNIT = np.float32(1 / 127)
_BYTES = integers(-127, 127, np.int8)
LEVELS = _BYTES._replace(
    value=lambda codes: codes.astype(np.float32) * _UNIT,
    nearest=lambda level: _BYTES.nearest(level * 127),
    fit=fit_magnitude(1),
    width=lambda codes: np.full((1, 1), _UNIT),
    span=CodeSpan(-127, 127, 1 / 127),
)


def _int8_weight(module: ModuleTensors) -> Weight:
    """Returns the weight of one module, after checking the shapes of its parts."""
    base = module.base
    codes = module.part("weight", ("I8",), (None, None))
    rows, columns = module.shape("weight")
    parts = {"codes": codes, "scale": module.part("SCB", ("F32",), (rows,))}
    if module.has("weight_format"):
        parts["format"] = module.part("weight_format", ("U8",), ())
        if int(base.read(parts["format"])) != 0:
            raise unreadable(
                module.codec,
                base,
                "its rows are not stored one after the other",
                parts["format"],
                "weight_format 0",
            )
    if not rows or not columns:
        raise FormatError("an empty weight", where=f"{base.folder}, {codes}")
    return CodeLayout().weight(module, (rows, columns), "F32", parts, Grid(LEVELS, Groups(columns)))


def match(base: Checkpoint) -> list[Weight]:
    """Returns the weights in 4 bits, then those in 8."""
    in_bytes = modules_with(base, "bitsandbytes int8", ".SCB")
    return [*bnb4.match(base), *(_int8_weight(module) for module in in_bytes)]


CODECS.register(Codec("bitsandbytes", "NF4 and FP4, with and without double quantization, and int8", match))
