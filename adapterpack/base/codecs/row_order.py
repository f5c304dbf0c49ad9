"""Reorders rows of weights that a file stores in another order than the model, as llama.cpp does with queries
and keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .storage import LazyMatrix, WeightStorage


def as_model(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns rows of the file in the model's order; ``order`` is, for each row of a run in the file, its row
    in the model's run.
    """
    runs = values.reshape(-1, len(order), *values.shape[1:])
    reordered = np.empty_like(runs)
    reordered[:, order] = runs
    return reordered.reshape(values.shape)


def as_file(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns rows of the model in the file's order; reverses :func:`as_model`.

    Example:
        >>> order = np.array([0, 2, 1, 3])
        >>> as_file(np.arange(8), order).tolist(), as_model(as_file(np.arange(8), order), order).tolist()
        ([0, 2, 1, 3, 4, 6, 5, 7], [0, 1, 2, 3, 4, 5, 6, 7])
    """
    return values.reshape(-1, len(order), *values.shape[1:])[:, order].reshape(values.shape)


def reorder_rows(storage: WeightStorage, order: np.ndarray | None) -> WeightStorage:
    """Returns the same storage with its rows in the model's order; raw blocks remain in the file's, and
    contain complete runs.
    """
    if order is None:
        return storage
    reader, writer = storage
    run = len(order)

    def reordered(matrix: Any) -> LazyMatrix:
        def read(start: int, stop: int) -> np.ndarray:
            return as_model(np.asarray(matrix[start:stop]), order)

        return LazyMatrix(matrix.shape, matrix.dtype, read, run)

    return WeightStorage(
        reader._replace(
            matrices=lambda kind: [reordered(matrix) for matrix in reader.matrices(kind)],
            decode=lambda raw, scratch: as_model(reader.decode(raw, scratch), order),
            step=run,
            plain=None,
        ),
        writer._replace(
            encode=lambda values, rows, rounding, scratch: writer.encode(
                as_file(values, order), rows, rounding, scratch
            ),
            reread=lambda raw, work, scratch: as_model(writer.reread(raw, work, scratch), order),
            plain=None,
        ),
    )
