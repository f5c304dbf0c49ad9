"""Orthogonal matrices from free numbers, by Cayley's map, and how a width is cut into blocks: what the rotating methods share."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from .operators import Array


@lru_cache(maxsize=64)
def triangle(size: int) -> np.ndarray:
    """Where the entries of a skew-symmetric matrix ``[size, size]``, flat, lie in ``[v, -v, 0]``: v is its upper triangle, row by row.

    Example:
        >>> triangle(2)
        array([2, 0, 1, 2], dtype=int32)
    """
    count = size * (size - 1) // 2
    index = np.full((size, size), 2 * count, np.int32)
    rows, columns = np.triu_indices(size, 1)
    index[rows, columns] = np.arange(count)
    index[columns, rows] = count + np.arange(count)
    return index.reshape(-1)


def skew(values: Array, index: Array, size: int) -> Array:
    """Skew-symmetric matrices ``[n, size, size]`` with the upper triangles ``values`` ``[n, ...]``; ``index``: :func:`triangle`."""
    xp = array_namespace(values)
    zero = xp.zeros((values.shape[0], 1), dtype=values.dtype, device=values.device)
    return xp.reshape(xp.take(xp.concat([values, -values, zero], axis=1), index, axis=1), (values.shape[0], size, size))


def cayley(generator: Array, terms: int = 0) -> Array:
    """The rotations ``(I - Q)^-1 (I + Q)`` of skew-symmetric ``Q`` ``[n, b, b]``; exactly the identity where Q is zero.

    With ``terms`` it is a Neumann series instead, which needs no solve and is near a rotation where Q is small: ``I + 2 Q`` for two terms,
    ``I + 2 Q + 2 Q^2 + ... + Q^(terms - 1)`` for more, the last power once and at least the third, as in PEFT (OFTv2, arXiv 2506.19847).
    """
    xp = array_namespace(generator)
    eye = xp.eye(generator.shape[-1], dtype=generator.dtype, device=generator.device)
    if terms:
        total, power, last = eye + 2 * generator, generator, max(terms - 1, 3)
        for number in range(2, last + 1 if terms > 2 else 2):
            power = xp.matmul(power, generator)
            total = total + (power if number == last else 2 * power)
        return total
    return solve(eye - generator, eye + generator)


def solve(matrix: Array, right: Array) -> Array:
    """``matrix^-1 right``; computed in float32 where the dtype is a smaller one, which linear algebra libraries do not take."""
    xp: Any = array_namespace(matrix, right)
    if matrix.dtype in (xp.float32, xp.float64):
        return xp.linalg.solve(matrix, right)
    return xp.astype(xp.linalg.solve(xp.astype(matrix, xp.float32), xp.astype(right, xp.float32)), matrix.dtype)


def block_size(width: int, wanted: int, count: int = 0) -> int:
    """The size of the blocks that ``width`` is cut into: ``wanted``, or what ``count`` blocks leave; the nearest that divides.

    Of two that are as near, the smaller (a smaller number of blocks). A block of one number cannot turn: where only such blocks would
    do, the whole width is one block.

    Example:
        >>> block_size(768, 32), block_size(12, 5), block_size(7, 2), block_size(4, 32), block_size(12, 0, count=3)
        (32, 4, 7, 4, 4)
    """
    near = nearest_divisor(width, count or wanted)
    size = width // max(near, 1) if count else near
    return size if size > 1 else width


def nearest_divisor(width: int, wanted: int) -> int:
    """The divisor of ``width`` that is nearest to ``wanted``, the smaller of two that are as near; 0 for no width.

    Example:
        >>> nearest_divisor(12, 5), nearest_divisor(12, 40), nearest_divisor(7, 3)
        (4, 12, 1)
    """
    divisors = (part for part in range(1, width + 1) if width % part == 0)
    return min(divisors, key=lambda part: (abs(part - wanted), part), default=0)
