"""Finds rows of a checkpoint in MatMulNBits weights: the nearest rows, if they are as near as rounding
allows.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import TypeVar

import numpy as np

from ..adapter_methods import row_blocks
from .graph_file import GraphFile
from .nbits import NBits, dequantize, grid_of, quantized_nodes, require_plain
from .rows import RowRun, true_runs

Key = TypeVar("Key", bound=Hashable)
ALLOWED = 0.7
"""The largest root mean square distance, in steps of the grid. Rounding to nearest gives 0.29, and the
calibrated roundings (GPTQ, HQQ) below 0.6; the rows of another weight are several steps away at 4 bits or
more, and about 1 at 2 bits.
"""
_PROBES = 5


def match_codes(
    graph: GraphFile, wanted: Mapping[Key, np.ndarray]
) -> Iterator[tuple[Key, NBits, list[RowRun]]]:
    """Yields every quantized weight that contains rows of a wanted matrix ``[out, in]``, with the runs of
    these rows.
    """
    for quantized in quantized_nodes(graph):
        fitting = {key: matrix for key, matrix in wanted.items() if matrix.shape[1] == quantized.columns}
        if not fitting:
            continue
        require_plain(graph, quantized)
        first = dequantize(graph, quantized, slice(0, quantized.rows), first_block_only=True)
        step = grid_of(graph, quantized, slice(0, quantized.rows)).scale[:, :1]
        for key, matrix in fitting.items():
            if runs := _near(graph, quantized, matrix, first, step):
                yield key, quantized, runs


def _near(
    graph: GraphFile, quantized: NBits, matrix: np.ndarray, first: np.ndarray, step: np.ndarray
) -> list[RowRun]:
    """Returns the runs of a matrix in one quantized weight, of whose rows ``first`` is the first block of
    columns and ``step`` its scale.
    """
    width = first.shape[1]
    shifts = set()
    for row in np.unique(np.linspace(0, len(matrix) - 1, _PROBES).astype(int)):
        distance = _steps(first, matrix[row, :width].astype(np.float32), step, width)
        nearest = int(distance.argmin())
        # the distance is estimated from a few columns, so allow a margin
        if distance[nearest] <= 2 * ALLOWED:
            shifts.add(nearest - int(row))
    runs = []
    for shift in sorted(shifts):
        equal = near_rows(graph, quantized, matrix, shift)
        runs += [RowRun(start, stop, start + shift) for start, stop in true_runs(equal)]
    return runs


def near_rows(graph: GraphFile, quantized: NBits, matrix: np.ndarray, shift: int) -> np.ndarray:
    """Returns for each row of a matrix whether the row that lies ``shift`` rows further in a quantized weight
    is as near as rounding allows.
    """
    low = max(0, -shift)
    high = min(len(matrix), quantized.rows - shift)
    near = np.zeros(len(matrix), bool)
    for block in row_blocks(high - low, quantized.columns):
        a, b = low + block.start, low + block.stop
        rows = slice(a + shift, b + shift)
        scale = grid_of(graph, quantized, rows).scale
        distance = _steps(
            dequantize(graph, quantized, rows), matrix[a:b].astype(np.float32), scale, quantized.block
        )
        near[a:b] = distance <= ALLOWED
    return near


def _steps(dequantized_rows: np.ndarray, wanted: np.ndarray, scale: np.ndarray, block: int) -> np.ndarray:
    """Returns the root mean square difference of each row in steps of the grid; ``scale`` ``[rows, blocks]``
    is that of each ``block`` of columns. A block of zeros has no step and must be equal.
    """
    rows, columns = dequantized_rows.shape
    difference = np.zeros((rows, scale.shape[1] * block), np.float32)
    np.subtract(dequantized_rows, wanted, out=difference[:, :columns])
    parts = difference.reshape(rows, -1, block)
    squares = np.einsum("rbk,rbk->rb", parts, parts).astype(np.float64)
    nothing = np.where(squares > 0, np.inf, 0.0)
    steps = np.divide(squares, np.square(scale, dtype=np.float64), out=nothing, where=scale != 0)
    distance: np.ndarray = np.sqrt(steps.sum(axis=1) / columns)
    return distance
