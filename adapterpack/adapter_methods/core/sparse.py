"""Sparse matrices, which are zero except at a few positions."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .arrays import array_namespace
from .operators import Array


class Sparse(NamedTuple):
    """A matrix of ``shape`` ``[out, in]`` with ``values`` ``[n]`` at the distinct positions ``at`` ``[2, n]``
    and zeros elsewhere.
    """

    values: Array
    at: Array
    shape: tuple[int, int]

    def apply(self, x: Array) -> Array:
        """``x M^T``."""
        return x @ self.dense().T

    def dense(self) -> Array:
        """``M`` itself."""
        return scatter(array_namespace(self.values), self.values, self.at, self.shape)

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        return weight @ self.dense()

    def onto(self, weight: Array) -> Array:
        """Returns ``weight + M`` for a weight of the same shape, with one copy of the weight and no dense
        ``M``.

        The copy keeps the weight's memory layout, so that later computations round as they would with the
        original.
        """
        xp = array_namespace(weight)
        result = xp.asarray(weight, copy=True)
        wide = xp.astype(self.at, xp.int64, copy=False)
        at = wide[0], wide[1]
        result[at] = result[at] + self.values
        return result


def scatter(xp: Any, values: Array, at: Array, shape: tuple[int, int]) -> Array:
    """Returns zeros of ``shape`` with ``values`` ``[n]`` at the distinct positions ``at`` ``[2, n]``."""
    dense = xp.zeros(shape[0] * shape[1], dtype=values.dtype, device=values.device)
    dense[_flat(xp, at, shape)] = values
    return xp.reshape(dense, shape)


def _flat(xp: Any, at: Array, shape: tuple[int, int]) -> Array:
    """Returns positions ``[2, n]`` as flat row-major indices ``[n]``."""
    wide = xp.astype(at, xp.int64, copy=False)
    return wide[0] * shape[1] + wide[1]


def require_places(at: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless ``at`` ``[axes, n]`` are distinct positions in an array of ``shape``, where a
    size of 0 is unknown.
    """
    if at.dtype.kind not in "iu":
        raise ValueError(f"places are whole numbers, not {at.dtype}")
    for axis, size in zip(at, shape, strict=True):
        if axis.size and (axis.min() < 0 or (size and axis.max() >= size)):
            raise ValueError(
                f"a place lies outside of the weight: {axis.min()} to {axis.max()}, of {size or 'unknown'}"
            )
    # Sorting puts equal positions next to each other, where their difference is zero on every axis.
    if at.shape[1] > 1 and np.any(np.all(np.diff(at[:, np.lexsort(at)]) == 0, axis=0)):
        raise ValueError("a place is named twice")
