"""K-quants: fits each block's scale and minimum by weighted least squares over twenty candidates, as
llama.cpp does.

ONNX Runtime provides the fit. For a block whose weights all have one sign it clips the zero point, which
ruins the block, so each block keeps the better of the fitted grid and of the grid between its extremes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ....onnx_graph import BlockGrid, fresh_grid, nearest, split_blocks, values
from .. import ALGORITHMS, Algorithm, Codes, ConstantProduct, RoundingSetting


def round_k_quant(rows: np.ndarray, setting: RoundingSetting, dtype: np.dtype) -> Codes:
    """Returns the codes of rows ``[out, in]`` on the better of both grids for each block, with scales rounded
    to ``dtype`` first.
    """
    # imports onnx tooling
    from onnxruntime.quantization.neural_compressor import weight_only  # noqa: PLC0415

    x = split_blocks(setting.block_size, rows)
    # a block of equal weights divides by zero in the fit, and keeps its first grid
    with np.errstate(divide="ignore", invalid="ignore"):
        _, scale, zero = weight_only.quant_tensor_k_quant_cpu(x, setting.bits, setting.block_size)
    shape = x.shape[:2]
    fit = BlockGrid(
        scale.reshape(shape).astype(dtype).astype(np.float32), zero.reshape(shape).astype(np.float32), False
    )
    plain = fresh_grid(x, setting.bits, False, dtype)
    errors = [np.square(values(nearest(x, grid, setting.bits), grid) - x).sum(-1) for grid in (plain, fit)]
    better = errors[1] < errors[0]
    grid = BlockGrid(np.where(better, fit.scale, plain.scale), np.where(better, fit.zero, plain.zero), False)
    return Codes(nearest(x, grid, setting.bits), grid)


def _replace(product: ConstantProduct, setting: RoundingSetting) -> ir.Graph:
    return product.in_bits(round_k_quant(product.rows(), setting, product.dtype.numpy()), setting.bits)


ALGORITHMS.register(
    Algorithm(
        "k-quant",
        "scale and least value of each block fitted by weighted least squares",
        _replace,
        symmetric=frozenset({False}),
    )
)
