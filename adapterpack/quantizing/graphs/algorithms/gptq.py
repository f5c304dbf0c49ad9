"""GPTQ: rounds columns one after another, and corrects the remaining columns for the error of each.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
https://arxiv.org/abs/2210.17323, algorithm 1: with ``H`` the mean of ``x xᵀ``, and ``U`` the upper Cholesky
factor of its inverse, column ``j`` errs by ``e = (w_j - q_j) / U_jj``, and every later column ``k`` becomes
``w_k - e U_jk``. Inputs are those of the float model.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ....onnx_graph import BlockGrid, fresh_grid, nearest, values
from .. import ALGORITHMS, Algorithm, Codes, ConstantProduct, RoundingSetting

DAMPING = 0.01
"""The addition to the diagonal of ``H``, as a share of its mean."""
_LAZY = 128
"""Columns whose corrections of the later columns are applied together, as one matrix product."""


def round_gptq(rows: np.ndarray, second: np.ndarray, setting: RoundingSetting, dtype: np.dtype) -> Codes:
    """Returns the codes of rows ``[out, in]`` for inputs with the mean ``second`` ``[in, in]`` of ``x xᵀ``;
    scales are rounded to ``dtype``.

    A block's grid spans the extremes of its columns as corrected so far, at the time when the block is
    rounded.
    """
    out, width = rows.shape
    block = setting.block_size
    padded = -width % block
    W = np.pad(rows.astype(np.float32), ((0, 0), (0, padded)))
    upper = np.pad(_upper(second), ((0, padded), (0, padded)))
    upper[range(width, width + padded), range(width, width + padded)] = 1
    blocks = (width + padded) // block
    grid = BlockGrid(
        np.zeros((out, blocks), np.float32), np.zeros((out, blocks), np.float32), setting.symmetric
    )
    q = np.zeros((out, blocks, block), np.float32)
    step = max(block, _LAZY)
    for first in range(0, width + padded, step):
        last = min(first + step, width + padded)
        errors = np.zeros((out, last - first), np.float32)
        for column in range(first, last):
            at, place = divmod(column, block)
            if place == 0:
                fresh = fresh_grid(
                    W[:, None, column : column + block], setting.bits, setting.symmetric, dtype
                )
                grid.scale[:, at], grid.zero[:, at] = fresh.scale[:, 0], fresh.zero[:, 0]
            one = BlockGrid(grid.scale[:, at : at + 1], grid.zero[:, at : at + 1], setting.symmetric)
            code = nearest(W[:, column][:, None, None], one, setting.bits)
            q[:, at, place] = code[:, 0, 0]
            error = (W[:, column] - values(code, one)[:, 0, 0]) / upper[column, column]
            W[:, column + 1 : last] -= np.outer(error, upper[column, column + 1 : last])
            errors[:, column - first] = error
        W[:, last:] -= errors @ upper[first:last, last:]
    return Codes(q, grid)


def _upper(second: np.ndarray) -> np.ndarray:
    """Returns the upper Cholesky factor of the inverse of the damped second moment, in float32; inputs that
    are always zero count as 1.
    """
    H = second.astype(np.float64)
    diagonal = np.diag(H).copy()
    H[range(len(H)), range(len(H))] = np.where(diagonal == 0, 1, diagonal) + DAMPING * max(
        float(diagonal.mean()), 1e-12
    )
    return np.linalg.cholesky(np.linalg.inv(H)).T.astype(np.float32)


def _replace(product: ConstantProduct, setting: RoundingSetting) -> ir.Graph:
    assert product.second is not None
    return product.in_bits(
        round_gptq(product.rows(), product.second, setting, product.dtype.numpy()), setting.bits
    )


ALGORITHMS.register(
    Algorithm(
        "gptq",
        "each column's error is made up for by later ones, on calibration rows",
        _replace,
        calibrated=True,
    )
)
