"""Half-quadratic quantization, by ONNX Runtime's own quantizer: zero points are fractions that make the many small errors smaller.

Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023, https://mobiusml.github.io/hqq_blog/.
"""

from __future__ import annotations

import warnings
from typing import Any

from ....extras import needed_by
from ..algorithm import ALGORITHMS, Algorithm
from ..onnxruntime_quantizer import quantized
from ..product import Product, Setting


def _replace(product: Product, setting: Setting) -> Any:
    with needed_by("the algorithm hqq"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read
        return quantized(product, setting, "HQQWeightOnlyQuantConfig")


ALGORITHMS.register(Algorithm("hqq", "zero points that are fractions, found by half-quadratic splitting; products are exact", _replace,
                              symmetric=frozenset({False})))
