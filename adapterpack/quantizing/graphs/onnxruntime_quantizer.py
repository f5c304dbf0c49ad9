"""Calls ONNX Runtime's quantizer on one product.

The quantizer needs a complete model in memory, so it gets models of one node: only one weight is in memory at
a time.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import onnx_ir as ir

from .product import ConstantProduct, RoundingSetting


def quantize_product(
    product: ConstantProduct, setting: RoundingSetting, config: str | None = None
) -> ir.Graph:
    """Returns the graph by which the quantizer replaces a product; ``config`` names one of its configuration
    classes instead of the default.
    """
    module = _module()
    chosen = None
    if config is not None:
        chosen = getattr(module, config)(
            bits=setting.bits, block_size=setting.block_size, op_types_to_quantize=("MatMul",)
        )
    quantizer = module.MatMulNBitsQuantizer(
        product.alone(),
        bits=setting.bits,
        block_size=setting.block_size,
        is_symmetric=setting.symmetric,
        op_types_to_quantize=("MatMul",),
        algo_config=chosen,
    )
    quantizer.process()
    return ir.from_proto(quantizer.model.model).graph


@functools.cache
def _module() -> Any:
    """Imports the quantizer's module, and undoes its side effect of enabling all logging in the process."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization import matmul_nbits_quantizer  # noqa: PLC0415 - imports onnx tooling

    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger(matmul_nbits_quantizer.__name__).setLevel(logging.WARNING)
    return matmul_nbits_quantizer
