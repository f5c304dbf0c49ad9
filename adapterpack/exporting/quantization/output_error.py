"""The error that a change of a weight makes in its product's outputs, from the second moment of the inputs
alone.
"""

from __future__ import annotations

import numpy as np


def output_error(change: np.ndarray, second: np.ndarray) -> float:
    """The mean over inputs of ``|D x|²`` for a change ``D`` ``[out, in]`` of the weight: ``tr(D S Dᵀ)`` with
    ``S`` the mean of ``x xᵀ``.

    Example:
        >>> output_error(np.array([[1.0, 2.0]]), np.diag([4.0, 1.0]))
        8.0
    """
    return float(np.sum((change @ second.astype(change.dtype)) * change, dtype=np.float64))
