"""Rounds to nearest (RTN) with ONNX Runtime's own quantizer: a block's scale and zero point come from its
extremes.
"""

from __future__ import annotations

from .. import ALGORITHMS, Algorithm, quantize_product

ALGORITHMS.register(
    Algorithm("rtn", "to the nearest code of a grid between each block's extremes", quantize_product)
)
