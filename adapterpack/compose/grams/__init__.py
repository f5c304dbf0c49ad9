"""Gram matrices of many narrow float32 matrices of one shape, and products with them, in float64.

A compiled kernel widens them where they are used, and takes all of them in one call; elsewhere numpy does it with copies of twice their
size. The sums are added up in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np

_kernel: ModuleType | None
try:
    from . import _grams as _kernel
except ImportError:  # nothing was compiled here, or the processor cannot run it
    _kernel = None

_MOST = 256
"""Columns that the kernel takes."""


class Narrow:
    """Matrices ``X_i`` ``[m, R]`` of float32; ``turned``: they are given as ``X_i^T`` ``[R, m]``.

    Example:
        >>> X = Narrow([np.array([[1, 2], [0, 1], [1, 0]], np.float32)])
        >>> X.grams()[0].tolist(), X.times(np.ones((1, 2, 1)))[0].ravel().tolist()
        ([[2.0, 2.0], [2.0, 5.0]], [3.0, 1.0, 1.0])
    """

    def __init__(self, matrices: Sequence[np.ndarray], turned: bool = False) -> None:
        self.turned = turned
        self._columns = matrices[0].shape[not turned]
        self._parts: tuple[np.ndarray, ...] = ()
        self._wide = np.empty(0)
        if _kernel is not None and self._columns <= _MOST:
            self._parts = tuple(np.ascontiguousarray(matrix) for matrix in matrices)
        else:
            self._wide = np.stack(matrices, dtype=np.float64)

    def grams(self) -> np.ndarray:
        """``X_i^T X_i``: ``[b, R, R]`` in float64."""
        if not self._parts:
            wide = self._wide.transpose(0, 2, 1) if self.turned else self._wide
            found: np.ndarray = np.matmul(wide.transpose(0, 2, 1), wide)
            return found
        assert _kernel is not None
        found = np.empty((len(self._parts), self._columns, self._columns))
        _kernel.grams(self._parts, self.turned, found)
        return found

    def times(self, Y: np.ndarray) -> np.ndarray:
        """``X_i Y_i`` ``[b, m, k]`` of ``Y`` ``[b, R, k]``, or where they are turned ``Y_i X_i^T`` ``[b, k, m]`` of ``Y`` ``[b, k, R]``;
        each number is rounded to float32 once."""
        if not self._parts:
            product: np.ndarray = np.matmul(Y, self._wide) if self.turned else np.matmul(self._wide, Y)
            return product.astype(np.float32)
        assert _kernel is not None
        length = self._parts[0].shape[self.turned]
        found = np.empty((len(Y), Y.shape[1], length) if self.turned else (len(Y), length, Y.shape[2]), np.float32)
        _kernel.times(self._parts, np.ascontiguousarray(Y, np.float64), self.turned, found, None)
        return found

    def signed(self, Y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`times` where nothing is turned, each column times its sign, so that its largest entry is positive; and the signs
        ``[b, k]``, 1 or -1."""
        if not self._parts:
            return signed(self.times(Y))
        assert _kernel is not None
        found, signs = np.empty((len(Y), len(self._parts[0]), Y.shape[2]), np.float32), np.empty((len(Y), Y.shape[2]))
        _kernel.times(self._parts, np.ascontiguousarray(Y, np.float64), False, found, signs)
        return found, signs


def signed(U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``U`` ``[b, m, k]`` with each column times its sign, which it overwrites, and the signs; as of :meth:`Narrow.signed`."""
    signs = np.where(U.max(axis=1) < -U.min(axis=1), -1.0, 1.0)
    np.multiply(U, signs[:, None, :].astype(U.dtype), out=U)
    return U, signs
