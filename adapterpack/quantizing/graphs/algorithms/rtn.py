"""Rounds to nearest (RTN) with ONNX Runtime's own quantizer: a block's scale and zero point come from its
extremes.
"""

from __future__ import annotations

import onnx_ir as ir

from .. import ALGORITHMS, Algorithm, ConstantProduct, RoundingSetting, quantize_product


def _replace(product: ConstantProduct, setting: RoundingSetting) -> ir.Graph:
    return quantize_product(product, setting)


ALGORITHMS.register(Algorithm("rtn", "to the nearest code of a grid between each block's extremes", _replace))
