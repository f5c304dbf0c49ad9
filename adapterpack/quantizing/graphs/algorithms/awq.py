"""AWQ: rounds the weights of inputs that are large on calibration rows more finely, by scaling these weights
up and the inputs down.

Lin et al., AWQ: Activation-aware Weight Quantization, https://arxiv.org/abs/2306.00978, section 3.2: ``s =
m^a`` with ``m`` the size of each input, and ``a`` the one of twenty between 0 and 1 with the least error of
the product's outputs. ``m`` is the root mean square here, where the paper has the mean magnitude. The
division stays a ``Mul`` before the product, so that the adapters' branches still read the unscaled input.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ....onnx_graph import fresh_grid, nearest, split_blocks, values
from .. import ALGORITHMS, Algorithm, Codes, ConstantProduct, RoundingSetting
from ..product import output_error

_EXPONENTS = np.arange(20) / 20


def round_awq(rows: np.ndarray, second: np.ndarray, setting: RoundingSetting, dtype: np.dtype) -> Codes:
    """Returns the codes of rows ``[out, in]`` times the best scales, and these scales ``[in]`` as the divisor
    of the inputs.
    """
    size = np.sqrt(np.maximum(np.diag(second).astype(np.float64), 0))
    size = np.maximum(size, 1e-4 * max(float(size.max()), 1e-12))
    best = None
    for exponent in _EXPONENTS:
        scales = size**exponent
        scales = (scales / np.sqrt(scales.max() * scales.min())).astype(dtype).astype(np.float32)
        x = split_blocks(setting.block_size, rows * scales)
        grid = fresh_grid(x, setting.bits, setting.symmetric, dtype)
        q = nearest(x, grid, setting.bits)
        found = values(q, grid).reshape(len(rows), -1)[:, : rows.shape[1]] / scales
        error = output_error(found - rows, second)
        if best is None or error < best[0]:
            best = error, Codes(q, grid, scales if exponent else None)
    assert best is not None
    return best[1]


def _replace(product: ConstantProduct, setting: RoundingSetting) -> ir.Graph:
    assert product.second is not None
    return product.in_bits(
        round_awq(product.rows(), product.second, setting, product.dtype.numpy()), setting.bits
    )


ALGORITHMS.register(
    Algorithm("awq", "finer weights for inputs that are large on calibration rows", _replace, calibrated=True)
)
