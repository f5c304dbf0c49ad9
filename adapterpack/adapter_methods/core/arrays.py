"""Finds the array library (numpy or torch) that arrays belong to, so that one implementation serves both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def array_namespace(*arrays: Any) -> Any:
    """Returns the module that implements the Python array API for ``arrays``.

    For numpy arrays that is numpy itself, which follows the standard since 2.1. array-api-compat's wrapper
    would import all of numpy, with ``numpy.f2py`` and ``numpy.testing``, and add a tenth of a second to every
    command.

    Raises:
        TypeError: the arrays belong to different libraries, or to none that is supported.

    Example:
        >>> array_namespace(np.ones(2)).__name__
        'numpy'
    """
    if arrays and all(isinstance(array, np.ndarray) for array in arrays):
        return np
    import array_api_compat  # noqa: PLC0415 - not needed for numpy arrays, and slow to import

    return array_api_compat.array_namespace(*arrays)


def identity(size: int, like: Any) -> Any:
    """Returns the identity matrix of a ``size``, with the library, dtype and device of an array."""
    return array_namespace(like).eye(size, dtype=like.dtype, device=like.device)


def block_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the block-diagonal matrix of matrices of any shapes.

    Example:
        >>> block_diagonal([np.ones((1, 2)), np.full((1, 1), 3.0)])
        array([[1., 1., 0.],
               [0., 0., 3.]])
    """
    rows, columns = (np.cumsum([0, *(block.shape[axis] for block in blocks)]) for axis in (0, 1))
    whole = np.zeros((rows[-1], columns[-1]), blocks[0].dtype)
    for number, block in enumerate(blocks):
        whole[rows[number] : rows[number + 1], columns[number] : columns[number + 1]] = block
    return whole
