"""Looks up single columns of a structured matrix: its outputs for one-hot inputs, which is what an embedding
needs for token ids.
"""

from __future__ import annotations

from ...errors import Unsupported
from .arrays import array_namespace
from .operators import Array, Chain, Dense, Kronecker, Operator


def columns(operator: Operator, ids: Array) -> Array:
    """Returns the columns ``M[:, ids]`` of a matrix ``[out, in]`` with shape ``[*ids.shape, out]``, which are
    its outputs for one-hot inputs.

    Only the columns asked for are computed.

    Raises:
        Unsupported: the operator cannot compute single columns.

    Example:
        >>> import numpy as np
        >>> columns(Dense(np.arange(6).reshape(2, 3)), np.array([[2, 0]]))
        array([[[2, 5],
                [0, 3]]])
    """
    if isinstance(operator, Chain):
        return operator.second.apply(columns(operator.first, ids))
    if isinstance(operator, Kronecker):
        # Column b d' + d is the product of column b of `left` and column d of `right`, which has d' columns.
        narrow = operator.right.shape[1]
        left, right = (
            columns(Dense(operator.left), ids // narrow),
            columns(Dense(operator.right), ids % narrow),
        )
        product = left[..., :, None] * right[..., None, :]
        return array_namespace(left).reshape(product, (*ids.shape, left.shape[-1] * right.shape[-1]))
    if not isinstance(operator, Dense):
        raise Unsupported(
            "the columns of this matrix cannot be looked up one by one, as an embedding needs them",
            found=type(operator).__name__,
            expected="Dense, Kronecker, Chain",
        )
    matrix = operator.matrix
    xp = array_namespace(matrix)
    # The array API's `take` needs one-dimensional indices.
    return xp.reshape(xp.take(matrix.T, xp.reshape(ids, (-1,)), axis=0), (*ids.shape, matrix.shape[0]))
