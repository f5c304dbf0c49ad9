"""W8A8: weights in eight bits with a scale for each column, activations in eight bits with a scale for each
row. Prompts and batches are read several times as fast as with float activations, at a larger error than that
of ``int8``, most of which calibration rows take away (:mod:`adapterpack.onnx_graph.int8_columns`).
"""

from __future__ import annotations

from ..product import RoundingSetting
from ..replace_products import round_products
from ..scheme import GRAPH_SCHEMES, GraphScheme

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
