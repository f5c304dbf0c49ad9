"""Codes of two, four or eight bits in blocks with one scale each: the base's products become
``MatMulNBits``. Codes of eight bits in columns with one scale each, and activations in eight bits with one
for each row: products of whole numbers (:mod:`adapterpack.onnx_graph.int8_columns`).
"""

from __future__ import annotations

import math

from .. import GRAPH_SCHEMES, GraphScheme, RoundingSetting
from ..replace_products import round_products

_TAKES = frozenset({"block_size", "symmetric", "algorithm", "calibration", "accuracy", "head", "compensate"})

for _bits, _summary, _tolerance in (
    (8, "eight bits: outputs move little", 0.1),
    (4, "four bits: an eighth of the size", math.inf),
    (2, "two bits: for weights that were trained for it, or with much compensation", math.inf),
):
    _name = f"int{_bits}"
    GRAPH_SCHEMES.register(
        GraphScheme(
            _name, _summary, round_products, RoundingSetting(_name, _bits, 32, False), _TAKES, _tolerance
        )
    )
GRAPH_SCHEMES.register(
    GraphScheme(
        "mixed",
        "two, four or eight bits for each product, searched under a budget by measured error",
        round_products,
        RoundingSetting("mixed", 4, 32, False),
        _TAKES,
        budgeted=True,
    )
)
GRAPH_SCHEMES.register(
    GraphScheme(
        "w8a8",
        "eight bits for weights and activations: the fastest for prompts and for many rows",
        round_products,
        RoundingSetting("w8a8", 8, 0, True),
        frozenset({"accuracy", "head", "calibration"}),
        tolerance=0.1,
        accuracy="fast",
    )
)
