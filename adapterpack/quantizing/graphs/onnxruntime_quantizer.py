"""Calls ONNX Runtime's quantizer on one product.

The quantizer needs a complete model in memory, so it gets models of one node: only one weight is in memory at
a time.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np
import onnx_ir as ir

from .product import ConstantProduct, RoundingSetting

_MOST = 1 << 24
"""The most numbers of a weight to quantize at a time."""


def quantize_product(
    product: ConstantProduct, setting: RoundingSetting, config: str | None = None
) -> ir.Graph:
    """Returns the graph by which the quantizer replaces a product; ``config`` names one of its configuration
    classes instead of the default. The rows of a large weight, which have scales of their own, are quantized
    a part at a time.
    """
    module = _module()
    chosen = None
    if config is not None:
        chosen = getattr(module, config)(
            bits=setting.bits, block_size=setting.block_size, op_types_to_quantize=("MatMul",)
        )
    parts = []
    for columns in product.columns(_MOST):
        quantizer = module.MatMulNBitsQuantizer(
            product.alone(columns),
            bits=setting.bits,
            block_size=setting.block_size,
            is_symmetric=setting.symmetric,
            op_types_to_quantize=("MatMul",),
            algo_config=chosen,
        )
        quantizer.process()
        parts.append(ir.from_proto(quantizer.model.model).graph)
    whole = parts[0]
    if len(parts) > 1:
        for name, value in whole.initializers.items():
            kept = [part.initializers[name] for part in parts]
            array = np.concatenate([one.const_value.numpy() for one in kept])
            joint = ir.tensor(array, value.const_value.dtype, name=name)
            for one in kept:
                one.const_value = None  # graphs are reference cycles: free the numbers now
            value.const_value = joint
            value.shape = joint.shape
        for node in whole:
            if "N" in node.attributes:
                node.attributes["N"] = ir.AttrInt64("N", product.out)
    return whole


@functools.cache
def _module() -> Any:
    """Imports the quantizer's module, and undoes its side effect of enabling all logging in the process."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    level = root.level
    from onnxruntime.quantization import matmul_nbits_quantizer  # noqa: PLC0415 - imports onnx tooling

    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger(matmul_nbits_quantizer.__name__).setLevel(logging.WARNING)
    return matmul_nbits_quantizer
