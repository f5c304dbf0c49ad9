"""What an algorithm of rounding is: from a product to the quantized product in its place; one file in
:mod:`.algorithms` each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from ...registry import Registry
from .product import ConstantProduct, RoundingSetting


@dataclass(frozen=True)
class Algorithm:
    """One way to round a weight to codes.

    ``replace`` gives the graph that stands in the place of a product, whose last node is a ``MatMulNBits``.
    ``calibrated``: it looks at
    :attr:`.ConstantProduct.second`. ``bits`` and ``symmetric`` are what it can round to.
    """

    name: str
    summary: str
    replace: Callable[[ConstantProduct, RoundingSetting], ir.Graph]
    calibrated: bool = False
    bits: frozenset[int] = frozenset({2, 4, 8})
    symmetric: frozenset[bool] = frozenset({False, True})


ALGORITHMS: Registry[Algorithm] = Registry(
    "algorithm of quantization", Algorithm, "adapterpack.quantization_algorithms", f"{__package__}.algorithms"
)
