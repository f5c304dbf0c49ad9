"""Defines a rounding algorithm: it maps a product to its quantized replacement. Each module of
:mod:`.algorithms` registers one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from ...registry import Registry
from .product import ConstantProduct, RoundingSetting


@dataclass(frozen=True)
class Algorithm:
    """A way to round a weight to codes.

    ``replace`` returns the graph that replaces a product; its last node is a ``MatMulNBits``. ``calibrated``:
    it uses :attr:`.ConstantProduct.second`. ``bits`` and ``symmetric`` are the settings that it supports.
    """

    name: str
    summary: str
    replace: Callable[[ConstantProduct, RoundingSetting], ir.Graph]
    calibrated: bool = False
    bits: frozenset[int] = frozenset({2, 4, 8})
    symmetric: frozenset[bool] = frozenset({False, True})


ALGORITHMS = Registry(
    "algorithm of quantization", Algorithm, "adapterpack.quantization_algorithms", f"{__package__}.algorithms"
)
