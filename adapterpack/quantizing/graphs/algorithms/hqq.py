"""Half-quadratic quantization (HQQ) with ONNX Runtime's own quantizer: fits fractional zero points so that
most errors become small.

Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023,
https://mobiusml.github.io/hqq_blog/.
"""

from __future__ import annotations

import warnings

import numpy as np
import onnx_ir as ir

from ....extras import needed_by
from ....onnx_graph import BlockGrid, unpack
from .. import ALGORITHMS, Algorithm, Codes, ConstantProduct, RoundingSetting, quantize_product


def _replace(product: ConstantProduct, setting: RoundingSetting) -> ir.Graph:
    with needed_by("the algorithm hqq"), warnings.catch_warnings():
        # the quantizer only reads it
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        graph = quantize_product(product, setting, "HQQWeightOnlyQuantConfig")
    if product.width % setting.block_size:  # the sums over blocks below would need padded inputs
        return graph
    return product.in_bits(_with_whole_zeros(graph, setting), setting.bits)


def _with_whole_zeros(graph: ir.Graph, setting: RoundingSetting) -> Codes:
    """Replaces fractional zero points by integers: ``(q - z) s = (q - round(z)) s + (round(z) - z) s``. ONNX
    Runtime's product with fractional zero points is five times as slow as with floats.
    """
    (node,) = graph
    codes, scales, zeros = (value.const_value.numpy() for value in node.inputs[1:])
    rows = node.attributes.get_int("N")
    scale, zero = (array.reshape(rows, -1).astype(np.float32) for array in (scales, zeros))
    whole = np.clip(np.rint(zero), 0, (1 << setting.bits) - 1)
    q = unpack(codes.reshape(*scale.shape, -1), setting.bits)
    return Codes(q, BlockGrid(scale, whole, False), minimum=scale * (whole - zero))


ALGORITHMS.register(
    Algorithm(
        "hqq",
        "zero points that are fractions, found by half-quadratic splitting",
        _replace,
        symmetric=frozenset({False}),
    )
)
