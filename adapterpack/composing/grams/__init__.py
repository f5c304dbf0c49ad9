"""Gram matrices of many narrow float32 matrices of one shape, their Cholesky factors, and products with the matrices, in float64.

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
    """Matrices ``X_i`` ``[m, R]`` of float32, each as parts that stand side by side, every part times a weight of its own; ``turned``: they
    are given as ``X_i^T`` ``[R, m]``, in parts that stand one below the other. All have the same shapes.

    Example:
        >>> X = Narrow([[np.array([[1], [0], [1]], np.float32), np.array([[2], [1], [0]], np.float32)]])
        >>> X.grams()[0].tolist(), X.times(np.ones((1, 2, 1)))[0].ravel().tolist()
        ([[2.0, 2.0], [2.0, 5.0]], [3.0, 1.0, 1.0])
    """

    def __init__(self, matrices: Sequence[Sequence[np.ndarray]], turned: bool = False, weights: Sequence[Sequence[float]] | None = None
                 ) -> None:
        self.turned = turned
        widths = [part.shape[not turned] for part in matrices[0]]
        self._columns, self._weights = sum(widths), None
        if weights is not None and any(weight != 1 for own in weights for weight in own):
            self._weights = np.repeat(np.array(weights, np.float64), widths, axis=1)
        self._parts: tuple[tuple[np.ndarray, ...], ...] = ()
        self._wide = np.empty(0)
        if _kernel is not None and self._columns <= _MOST:
            self._parts = tuple(tuple(np.ascontiguousarray(part) for part in parts) for parts in matrices)
        else:
            self._wide = np.stack([np.concatenate(parts, axis=int(not turned), dtype=np.float64) for parts in matrices])

    def grams(self) -> np.ndarray:
        """``X_i^T X_i``: ``[b, R, R]`` in float64."""
        if self._parts:
            assert _kernel is not None
            found = np.empty((len(self._parts), self._columns, self._columns))
            _kernel.grams(self._parts, self.turned, found)
        else:
            wide = self._wide.transpose(0, 2, 1) if self.turned else self._wide
            found = np.matmul(wide.transpose(0, 2, 1), wide)
        return found if self._weights is None else found * (self._weights[:, :, None] * self._weights[:, None, :])

    def times(self, Y: np.ndarray) -> np.ndarray:
        """``X_i Y_i`` ``[b, m, k]`` of ``Y`` ``[b, R, k]``, or where they are turned ``Y_i X_i^T`` ``[b, k, m]`` of ``Y`` ``[b, k, R]``;
        each number is rounded to float32 once."""
        Y = self._weighed(Y)
        if not self._parts:
            product: np.ndarray = np.matmul(Y, self._wide) if self.turned else np.matmul(self._wide, Y)
            return product.astype(np.float32)
        found = np.empty((len(Y), Y.shape[1], self._length) if self.turned else (len(Y), self._length, Y.shape[2]), np.float32)
        assert _kernel is not None
        _kernel.times(self._parts, Y, self.turned, found, None)
        return found

    def signed(self, Y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`times` where nothing is turned, each column times its sign, so that its largest entry is positive; and the signs
        ``[b, k]``, 1 or -1."""
        if not self._parts:
            return signed(self.times(Y))
        found, signs = np.empty((len(Y), self._length, Y.shape[2]), np.float32), np.empty((len(Y), Y.shape[2]))
        assert _kernel is not None
        _kernel.times(self._parts, self._weighed(Y), False, found, signs)
        return found, signs

    @property
    def _length(self) -> int:
        return int(self._parts[0][0].shape[self.turned])

    def _weighed(self, Y: np.ndarray) -> np.ndarray:
        """``Y`` with the weights of the columns that it is multiplied with."""
        if self._weights is not None:
            Y = Y * (self._weights[:, None, :] if self.turned else self._weights[:, :, None])
        return np.ascontiguousarray(Y, np.float64)


def factors(products: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray] | None:
    """The Cholesky factors ``U``, ``U^T U = G``, of Gram matrices ``[b, R, R]`` and their inverses, both above the diagonal; None where
    columns are nearly dependent, or not finite.

    They are those of the correlations ``C``, whose least eigenvalue is at least one over the trace of ``C^-1``: the sum of the squares of
    the factor's inverse. That has to be below the ``limit``.

    Example:
        >>> factors(np.array([[[4.0, 2.0], [2.0, 2.0]]]), 1e6)[0].tolist(), factors(np.ones((1, 2, 2)), 1e6)
        ([[[2.0, 1.0], [0.0, 1.0]]], None)
    """
    if _kernel is not None and products.shape[1] <= _MOST:
        U, back = np.empty_like(products), np.empty_like(products)
        return (U, back) if _kernel.factors(products, U, back, limit) else None
    sizes = np.sqrt(np.einsum("brr->br", products))
    if not sizes.all() or not np.isfinite(products).all():
        return None
    try:
        factor = np.linalg.cholesky(products / (sizes[:, :, None] * sizes[:, None, :]))
        back = np.linalg.inv(factor)
    except np.linalg.LinAlgError:
        return None
    if not np.sum(back**2, axis=(1, 2)).max() < limit:
        return None
    return factor.transpose(0, 2, 1) * sizes[:, None, :], back.transpose(0, 2, 1) / sizes[:, :, None]


def signed(U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``U`` ``[b, m, k]`` with each column times its sign, which it overwrites, and the signs; as of :meth:`Narrow.signed`."""
    signs = np.where(U.max(axis=1) < -U.min(axis=1), -1.0, 1.0)
    np.multiply(U, signs[:, None, :].astype(U.dtype), out=U)
    return U, signs
