"""The largest singular values and vectors of a matrix, exactly or by random projection."""

from __future__ import annotations

import numpy as np

from .. import Random
from ..core.torch_random import svd_in_range


def top(
    matrix: np.ndarray, r: int, iterations: int, rng: Random
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ``U`` ``[m, k]``, ``S`` ``[k]`` and ``V^T`` ``[k, n]`` of the ``k = min(r, m, n)`` largest
    singular values of ``[m, n]``, in float64.

    ``iterations`` 0 is exact. More uses the randomized range finder with that many power iterations (Halko,
    Martinsson and Tropp 2011, algorithms 4.4 and 5.1), oversampled by ``r``.

    Example:
        >>> u, s, vt = top(np.diag([3.0, 2.0, 1.0]), 2, 0, np.random.default_rng(0))
        >>> s.tolist()
        [3.0, 2.0]
    """
    wide = matrix.astype(np.float64)
    k = min(r, *wide.shape)
    if iterations == 0 or 2 * k >= min(wide.shape):
        u, s, vt = np.linalg.svd(wide, full_matrices=False)
        return u[:, :k], s[:k], vt[:k]
    u, s, vt = svd_in_range(wide, rng.normal(size=(wide.shape[1], 2 * k)), iterations)
    return u[:, :k], s[:k], vt[:k]
