"""Codes of two, four or eight bits in blocks with a scale each: the base's products become
``MatMulNBits``.
"""

from __future__ import annotations

import math

from ..in_codes import rewrite
from ..product import Setting
from ..scheme import SCHEMES, Scheme

_TAKES = frozenset({"block_size", "symmetric", "algorithm", "calibration", "accuracy", "head", "compensate"})

for _bits, _summary, _tolerance in (
    (8, "eight bits: outputs move little", 0.1),
    (4, "four bits: an eighth of the size", math.inf),
    (2, "two bits: for weights that were trained for it, or with much compensation", math.inf),
):
    _name = f"int{_bits}"
    SCHEMES.register(Scheme(_name, _summary, rewrite, Setting(_name, _bits, 32, False), _TAKES, _tolerance))
SCHEMES.register(
    Scheme(
        "mixed",
        "two, four or eight bits for each product, searched under a budget by measured error",
        rewrite,
        Setting("mixed", 4, 32, False),
        _TAKES,
        budgeted=True,
    )
)
