"""Makes orthogonal matrices from free numbers by Cayley's map, and cuts a width into blocks: shared by the
rotating methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from .arrays import array_namespace
from .operators import Array

MOST_TERMS = 64
"""Terms of a series in place of an inverse, each a product of matrices; its users have five."""


@lru_cache(maxsize=64)
def triangle(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the entries of a skew-symmetric matrix ``[size, size]``, flat, lie in its upper triangle, row by
    row, and with which sign.

    Example:
        >>> triangle(2)
        (array([0, 0, 0, 0]), array([ 0.,  1., -1.,  0.], dtype=float32))
    """
    index, sign = np.zeros((size, size), np.int64), np.zeros((size, size), np.float32)
    rows, columns = np.triu_indices(size, 1)
    index[rows, columns] = index[columns, rows] = np.arange(len(rows))
    sign[rows, columns], sign[columns, rows] = 1, -1
    return index.reshape(-1), sign.reshape(-1)


def skew(values: Array, index: Array, sign: Array, size: int) -> Array:
    """Skew-symmetric matrices ``[n, size, size]`` with the upper triangles ``values`` ``[n, ...]``; see
    :func:`triangle`.
    """
    xp = array_namespace(values)
    return xp.reshape(xp.take(values, index, axis=1) * sign, (values.shape[0], size, size))


def within(values: Array, bound: float) -> Array:
    """Upper triangles ``[n, ...]``, scaled back where their skew-symmetric matrix has a Frobenius norm above
    ``bound``.
    """
    xp = array_namespace(values)
    square = 2 * xp.sum(values * values, axis=1, keepdims=True)
    most = xp.full_like(square, bound**2)
    return values * xp.sqrt(most / xp.where(square > most, square, most))


def cayley(generator: Array, terms: int = 0) -> Array:
    """The rotations ``(I - Q)^-1 (I + Q) = 2 (I - Q)^-1 - I`` of skew-symmetric ``Q`` ``[n, b, b]``; exactly
    I where Q is zero.

    With ``terms`` it is a Neumann series instead, which needs no inverse and is near a rotation if Q is
    small: ``I + 2 Q`` for two terms, ``I + 2 Q + 2 Q^2 + ... + Q^(terms - 1)`` for more, the last power once
    and at least the third, as in PEFT (OFTv2, arXiv 2506.19847).
    """
    xp = array_namespace(generator)
    eye = xp.eye(generator.shape[-1], dtype=generator.dtype, device=generator.device)
    if terms:
        if terms == 2:
            return eye + 2 * generator
        twice = 2 * eye
        inner = twice + generator
        for _ in range(max(terms - 1, 3) - 2):
            inner = twice + xp.matmul(generator, inner)
        return eye + xp.matmul(generator, inner)
    return 2 * linear(xp.linalg.inv, eye - generator) - eye


def linear(function: Callable[..., Array], *matrices: Array) -> Array:
    """``function(*matrices)``, computed in float32 where the dtype is a smaller one, which linear algebra
    libraries do not take.
    """
    xp, dtype = array_namespace(*matrices), matrices[0].dtype
    if dtype in (xp.float32, xp.float64):
        return function(*matrices)
    return xp.astype(function(*(xp.astype(matrix, xp.float32) for matrix in matrices)), dtype)


@lru_cache(maxsize=256)
def block_size(width: int, wanted: int, count: int = 0) -> int:
    """The size of the blocks that ``width`` is cut into: ``wanted``, or what ``count`` blocks leave; the
    nearest that divides.

    Of two that are as near, the smaller (a smaller number of blocks). A block of one number cannot turn:
    where only such blocks would do, the whole width is one block.

    Example:
        >>> block_size(768, 32), block_size(12, 5), block_size(7, 2), block_size(4, 32), block_size(12, 0,
        ...     count=3)
        (32, 4, 7, 4, 4)
    """
    near = nearest_divisor(width, count or wanted)
    size = width // max(near, 1) if count else near
    return size if size > 1 else width


@lru_cache(maxsize=256)
def nearest_divisor(width: int, wanted: int) -> int:
    """The divisor of ``width`` that is nearest to ``wanted``, the smaller of two that are as near; 0 for no
    width.

    Example:
        >>> nearest_divisor(12, 5), nearest_divisor(12, 40), nearest_divisor(7, 3)
        (4, 12, 1)
    """
    best = min(width, 1)
    for small in range(1, math.isqrt(width) + 1):  # a loop that torch.compile can trace
        if width % small == 0:
            for part in (small, width // small):
                if (abs(part - wanted), part) < (abs(best - wanted), best):
                    best = part
    return best
