"""Builds orthogonal matrices from unconstrained numbers with the Cayley transform, and divides a width into
blocks, for the methods that rotate (OFT, BOFT ...).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated

import numpy as np
from msgspec import Meta

from .arrays import array_namespace, identity
from .operators import Array

MOST_TERMS = 64
"""The most terms of the Neumann series that replaces an inverse. Each term is a matrix product; methods use
five.
"""
Terms = Annotated[int, Meta(ge=2, le=MOST_TERMS)]
"""The type of a number of terms of that series."""


@lru_cache(maxsize=64)
def triangle(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns, for each entry of a flattened skew-symmetric matrix ``[size, size]``, its index in the
    row-by-row upper triangle and its sign.

    Example:
        >>> triangle(2)
        (array([0, 0, 0, 0]), array([ 0.,  1., -1.,  0.], dtype=float32))
    """
    index = np.zeros((size, size), np.int64)
    sign = np.zeros((size, size), np.float32)
    rows, columns = np.triu_indices(size, 1)
    index[rows, columns] = index[columns, rows] = np.arange(len(rows))
    sign[rows, columns], sign[columns, rows] = 1, -1
    return index.reshape(-1), sign.reshape(-1)


def skew(values: Array, index: Array, sign: Array, size: int) -> Array:
    """Builds skew-symmetric matrices ``[n, size, size]`` from their upper triangles ``values`` ``[n, ...]``,
    with ``index`` and ``sign`` from :func:`triangle`.
    """
    xp = array_namespace(values)
    return xp.reshape(xp.take(values, index, axis=1) * sign, (values.shape[0], size, size))


def within(values: Array, bound: float) -> Array:
    """Scales upper triangles ``[n, ...]`` back to a Frobenius norm of ``bound`` where the norm of their
    skew-symmetric matrix exceeds it.
    """
    xp = array_namespace(values)
    square = 2 * xp.sum(values * values, axis=1, keepdims=True)
    most = xp.full_like(square, bound**2)
    # Dividing by the larger of both keeps the factor at exactly 1 within the bound, with a finite gradient at
    # zero.
    return values * xp.sqrt(most / xp.where(square > most, square, most))


def cayley(generator: Array, terms: int = 0) -> Array:
    """Returns the rotations ``(I - Q)^-1 (I + Q) = 2 (I - Q)^-1 - I`` of skew-symmetric ``Q`` ``[n, b, b]``;
    exactly I where Q is zero.

    With ``terms`` it uses a Neumann series instead, which needs no inverse and is close to a rotation for
    small Q: ``I + 2 Q`` for two terms, ``I + 2 Q + 2 Q^2 + ... + Q^(terms - 1)`` for more. The last power has
    the coefficient 1 and is at least the third, as in PEFT (OFTv2, arXiv 2506.19847).
    """
    xp = array_namespace(generator)
    eye = identity(generator.shape[-1], generator)
    if terms:
        if terms == 2:
            return eye + 2 * generator
        twice = 2 * eye
        # Horner's scheme: one matrix product per power. The last coefficient is 1, not 2, as in PEFT.
        inner = twice + generator
        for _ in range(max(terms - 1, 3) - 2):
            inner = twice + xp.matmul(generator, inner)
        return eye + xp.matmul(generator, inner)
    return 2 * linear(xp.linalg.inv, eye - generator) - eye


def linear(function: Callable[..., Array], *matrices: Array) -> Array:
    """Returns ``function(*matrices)``, computed in float32 if the dtype is smaller, because linear algebra
    libraries do not support half precision.
    """
    xp = array_namespace(*matrices)
    dtype = matrices[0].dtype
    if dtype in (xp.float32, xp.float64):
        return function(*matrices)
    return xp.astype(function(*(xp.astype(matrix, xp.float32) for matrix in matrices)), dtype)


@lru_cache(maxsize=256)
def block_size(width: int, wanted: int, count: int = 0) -> int:
    """Returns the size of the blocks that divide ``width``: the divisor nearest to ``wanted``, or the size
    that results from the number of blocks nearest to ``count``.

    Of two equally near divisors the smaller wins. A block of one number cannot rotate, so if only such blocks
    are possible, the entire width is one block.

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
    """Returns the divisor of ``width`` that is nearest to ``wanted``, the smaller one in a tie; 0 if
    ``width`` is 0.

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
