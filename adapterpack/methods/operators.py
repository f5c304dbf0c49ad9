"""The structured matrices of the normal form: what ``pre``, ``down`` and ``up`` may be.

Each operator is a value over one array of any array-API library. Nothing wide is materialised unless ``dense`` is asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from array_api_compat import array_namespace

from ..errors import Unsupported

Array = Any


class Operator(Protocol):
    """A linear map on the last axis, ``x -> x M^T``, with ``M`` of shape ``[out, in]``."""

    def apply(self, x: Array) -> Array:
        """``x M^T``: shape ``[..., in]`` to ``[..., out]``."""
        ...

    def dense(self) -> Array:
        """``M`` itself, shape ``[out, in]``."""
        ...

    def rows(self, block: slice) -> Array:
        """The rows ``M[block]``, shape ``[len(block), in]``."""
        ...

    def after(self, weight: Array) -> Array:
        """``weight M``: what a dense weight ``[k, out]`` becomes when ``M`` acts on its input; shape ``[k, in]``."""
        ...


class Dense(NamedTuple):
    """A plain matrix ``[out, in]``."""

    matrix: Array

    def apply(self, x: Array) -> Array:
        """See :class:`Operator`."""
        return array_namespace(x, self.matrix).matmul(x, self.matrix.T)

    def dense(self) -> Array:
        """See :class:`Operator`."""
        return self.matrix

    def rows(self, block: slice) -> Array:
        """See :class:`Operator`."""
        return self.matrix[block]

    def after(self, weight: Array) -> Array:
        """See :class:`Operator`."""
        return array_namespace(weight, self.matrix).matmul(weight, self.matrix)


class Diagonal(NamedTuple):
    """A diagonal matrix, held as its diagonal ``[n]``."""

    vector: Array

    def apply(self, x: Array) -> Array:
        """See :class:`Operator`."""
        return x * self.vector

    def dense(self) -> Array:
        """See :class:`Operator`."""
        xp = array_namespace(self.vector)
        return xp.eye(self.vector.shape[0], dtype=self.vector.dtype, device=self.vector.device) * self.vector

    def rows(self, block: slice) -> Array:
        """See :class:`Operator`."""
        return self.dense()[block]

    def after(self, weight: Array) -> Array:
        """See :class:`Operator`."""
        return weight * self.vector


class BlockDiagonal(NamedTuple):
    """Blocks ``[n, b_out, b_in]`` along the diagonal: shape ``[n b_out, n b_in]``."""

    blocks: Array

    def apply(self, x: Array) -> Array:
        """See :class:`Operator`."""
        xp = array_namespace(x, self.blocks)
        count, wide, narrow = self.blocks.shape
        rows = xp.permute_dims(xp.reshape(x, (-1, count, narrow)), (1, 0, 2))
        turned = xp.matmul(rows, xp.permute_dims(self.blocks, (0, 2, 1)))
        return xp.reshape(xp.permute_dims(turned, (1, 0, 2)), (*x.shape[:-1], count * wide))

    def dense(self) -> Array:
        """See :class:`Operator`."""
        xp = array_namespace(self.blocks)
        count, wide, narrow = self.blocks.shape
        spread = xp.eye(count, dtype=self.blocks.dtype, device=self.blocks.device)[:, None, :, None] * self.blocks[:, :, None, :]
        return xp.reshape(spread, (count * wide, count * narrow))

    def rows(self, block: slice) -> Array:
        """See :class:`Operator`."""
        return self.dense()[block]

    def after(self, weight: Array) -> Array:
        """See :class:`Operator`."""
        return transposed(self).apply(weight)


class Kronecker(NamedTuple):
    """``left ⊗ right`` of ``[a, b]`` and ``[c, d]``: shape ``[a c, b d]``."""

    left: Array
    right: Array

    def apply(self, x: Array) -> Array:
        """See :class:`Operator`."""
        xp = array_namespace(x, self.left, self.right)
        wide = xp.reshape(x, (*x.shape[:-1], self.left.shape[1], self.right.shape[1]))
        inner = xp.matmul(wide, self.right.T)
        turned = xp.matmul(self.left, inner)
        return xp.reshape(turned, (*x.shape[:-1], self.left.shape[0] * self.right.shape[0]))

    def dense(self) -> Array:
        """See :class:`Operator`."""
        xp = array_namespace(self.left, self.right)
        (a, b), (c, d) = self.left.shape, self.right.shape
        return xp.reshape(self.left[:, None, :, None] * self.right[None, :, None, :], (a * c, b * d))

    def rows(self, block: slice) -> Array:
        """See :class:`Operator`."""
        return self.dense()[block]

    def after(self, weight: Array) -> Array:
        """See :class:`Operator`."""
        return transposed(self).apply(weight)


class Chain(NamedTuple):
    """``second first``: what ``first`` gives goes through ``second``."""

    first: Any
    second: Any

    def apply(self, x: Array) -> Array:
        """See :class:`Operator`."""
        return self.second.apply(self.first.apply(x))

    def dense(self) -> Array:
        """See :class:`Operator`."""
        return self.first.after(self.second.dense())

    def rows(self, block: slice) -> Array:
        """See :class:`Operator`."""
        return self.first.after(self.second.rows(block))

    def after(self, weight: Array) -> Array:
        """See :class:`Operator`."""
        return self.first.after(self.second.after(weight))


class Deviation(NamedTuple):
    """``I + up down``: the identity and a change of low rank, ``down`` ``[r, n]`` and ``up`` ``[n, r]``."""

    down: Array
    up: Array

    def apply(self, x: Array) -> Array:
        """See :class:`Operator`."""
        xp = array_namespace(x, self.down, self.up)
        return x + xp.matmul(xp.matmul(x, self.down.T), self.up.T)

    def dense(self) -> Array:
        """See :class:`Operator`."""
        xp = array_namespace(self.down, self.up)
        return xp.eye(self.up.shape[0], dtype=self.up.dtype, device=self.up.device) + xp.matmul(self.up, self.down)

    def rows(self, block: slice) -> Array:
        """See :class:`Operator`."""
        return self.dense()[block]

    def after(self, weight: Array) -> Array:
        """See :class:`Operator`."""
        xp = array_namespace(weight, self.down, self.up)
        return weight + xp.matmul(xp.matmul(weight, self.up), self.down)


def columns(operator: Operator, ids: Array) -> Array:
    """The columns ``M[:, ids]`` of a matrix ``[out, in]``, shape ``[*ids.shape, out]``: what it gives for one-hot inputs.

    Only the columns asked for are computed.

    Raises:
        Unsupported: the operator's columns cannot be had one by one.

    Example:
        >>> import numpy as np
        >>> columns(Dense(np.arange(6).reshape(2, 3)), np.array([[2, 0]]))
        array([[[2, 5],
                [0, 3]]])
    """
    for kind, look_up in _COLUMNS.items():
        if isinstance(operator, kind):
            return look_up(operator, ids)
    raise Unsupported("the columns of this matrix cannot be looked up one by one, as an embedding needs them",
                      found=type(operator).__name__, expected=", ".join(kind.__name__ for kind in _COLUMNS))


def _dense_columns(operator: Dense, ids: Array) -> Array:
    xp = array_namespace(operator.matrix)
    return xp.reshape(xp.take(operator.matrix.T, xp.reshape(ids, (-1,)), axis=0), (*ids.shape, operator.matrix.shape[0]))


def _kronecker_columns(operator: Kronecker, ids: Array) -> Array:
    """Column ``b d' + d`` of ``left ⊗ right`` is the product of column ``b`` of the one and column ``d`` of the other."""
    narrow = operator.right.shape[1]
    left, right = columns(Dense(operator.left), ids // narrow), columns(Dense(operator.right), ids % narrow)
    return array_namespace(left).reshape(left[..., :, None] * right[..., None, :], (*ids.shape, left.shape[-1] * right.shape[-1]))


_COLUMNS: dict[type[Any], Any] = {
    Dense: _dense_columns,
    Kronecker: _kronecker_columns,
    Chain: lambda operator, ids: operator.second.apply(columns(operator.first, ids)),
}


def transposed(operator: BlockDiagonal | Kronecker) -> Any:
    """``M^T`` as an operator of the same structure."""
    if isinstance(operator, Kronecker):
        return Kronecker(operator.left.T, operator.right.T)
    return BlockDiagonal(array_namespace(operator.blocks).permute_dims(operator.blocks, (0, 2, 1)))
