"""The structured matrices that ``pre``, ``down``, ``up`` and ``post`` of a normal form may be.

Each operator holds arrays of any array-API library and applies its matrix without materialising it; only
``dense`` builds the full matrix.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from ...errors import Unsupported
from .arrays import array_namespace, identity

Array = Any


class Operator(Protocol):
    """A linear map on the last axis, ``x -> x M^T``, with ``M`` of shape ``[out, in]``.

    An operator that makes single rows without ``dense`` also has ``rows(block)``: :func:`rows_of` calls it.
    """

    def apply(self, x: Array) -> Array:
        """``x M^T``: shape ``[..., in]`` to ``[..., out]``."""
        ...

    def dense(self) -> Array:
        """``M`` itself, shape ``[out, in]``."""
        ...

    def after(self, weight: Array) -> Array:
        """``weight M``: the weight ``[k, in]`` that results if ``M`` acts on the input of a dense weight
        ``[k, out]``.
        """
        ...


def rows_of(operator: Any, block: slice) -> Array:
    """Returns the rows ``M[block]``, shape ``[len(block), in]``."""
    return operator.rows(block) if hasattr(operator, "rows") else operator.dense()[block]


class Dense(NamedTuple):
    """A plain matrix ``factor * stored`` of shape ``[out, in]``; the product is computed only when it is
    needed.
    """

    stored: Array
    factor: float = 1.0

    @property
    def matrix(self) -> Array:
        """The matrix itself."""
        return self.stored if self.factor == 1 else self.factor * self.stored

    def apply(self, x: Array) -> Array:
        """``x M^T``."""
        return x @ self.matrix.T

    def dense(self) -> Array:
        """``M`` itself."""
        return self.matrix

    def rows(self, block: slice) -> Array:
        """``M[block]``."""
        return Dense(self.stored[block], self.factor).matrix

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        return weight @ self.matrix


class Scaled(NamedTuple):
    """``diag(left) matrix diag(right)`` of a matrix ``[out, in]``, which may be a constant, and vectors
    ``[out]`` and ``[in]``.
    """

    matrix: Array
    left: Array
    right: Array

    def apply(self, x: Array) -> Array:
        """``x M^T``."""
        return (x * self.right) @ self.matrix.T * self.left

    def dense(self) -> Array:
        """``M`` itself."""
        return self.left[:, None] * self.matrix * self.right

    def rows(self, block: slice) -> Array:
        """``M[block]``."""
        return self.left[block][:, None] * self.matrix[block] * self.right

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        return (weight * self.left) @ self.matrix * self.right


class Diagonal(NamedTuple):
    """A diagonal matrix, stored as its diagonal ``[n]``."""

    vector: Array

    def apply(self, x: Array) -> Array:
        """``x M^T``."""
        return x * self.vector

    def dense(self) -> Array:
        """``M`` itself."""
        return identity(self.vector.shape[0], self.vector) * self.vector

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        return weight * self.vector


class BlockDiagonal(NamedTuple):
    """A block-diagonal matrix of shape ``[n b_out, n b_in]`` with the blocks ``[n, b_out, b_in]``."""

    blocks: Array

    def apply(self, x: Array) -> Array:
        """``x M^T``."""
        xp = array_namespace(x, self.blocks)
        count, wide, narrow = self.blocks.shape
        rows = xp.permute_dims(xp.reshape(x, (-1, count, narrow)), (1, 0, 2))
        turned = xp.matmul(rows, xp.permute_dims(self.blocks, (0, 2, 1)))
        return xp.reshape(xp.permute_dims(turned, (1, 0, 2)), (*x.shape[:-1], count * wide))

    def dense(self) -> Array:
        """``M`` itself."""
        xp = array_namespace(self.blocks)
        count, wide, narrow = self.blocks.shape
        spread = identity(count, self.blocks)[:, None, :, None] * self.blocks[:, :, None, :]
        return xp.reshape(spread, (count * wide, count * narrow))

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        turned = array_namespace(self.blocks).permute_dims(self.blocks, (0, 2, 1))
        return BlockDiagonal(turned).apply(weight)


class BlockCirculant(NamedTuple):
    """A matrix of ``m x n`` circulant blocks: ``M[i b + t, j b + s] = kernel[i, j, (s - t) mod b]`` for a
    ``kernel`` of shape ``[m, n, b]``.
    """

    kernel: Array

    def apply(self, x: Array) -> Array:
        """``x M^T`` by the convolution theorem, computed in at least float32."""
        xp = array_namespace(x, self.kernel)
        tall, wide, size = self.kernel.shape
        if 0 in x.shape[:-1]:  # some libraries' FFTs reject empty inputs
            return xp.zeros((*x.shape[:-1], tall * size), dtype=x.dtype, device=x.device)
        exact = x.dtype if x.dtype == xp.float64 else xp.float32
        inputs = xp.fft.rfft(xp.astype(xp.reshape(x, (-1, wide, size)), exact, copy=False))
        kernel = xp.conj(xp.fft.rfft(xp.astype(self.kernel, exact, copy=False)))
        if wide == 1:
            outputs = inputs * kernel[:, 0, :]
        else:  # one matrix product for each frequency
            outputs = xp.permute_dims(
                xp.matmul(xp.permute_dims(inputs, (2, 0, 1)), xp.permute_dims(kernel, (2, 1, 0))), (1, 2, 0)
            )
        return xp.astype(
            xp.reshape(xp.fft.irfft(outputs, n=size), (*x.shape[:-1], tall * size)), x.dtype, copy=False
        )

    def dense(self) -> Array:
        """``M`` itself."""
        xp = array_namespace(self.kernel)
        tall, wide, size = self.kernel.shape
        # Cutting a periodic sequence into rows of two periods less one element shifts each row by one place,
        # which makes the blocks circulant without index arithmetic.
        rows = xp.reshape(
            xp.broadcast_to(self.kernel[:, :, None, :], (tall, wide, 2 * size - 1, size)),
            (tall, wide, size, 2 * size - 1),
        )
        return xp.reshape(xp.permute_dims(rows[..., :size], (0, 2, 1, 3)), (tall * size, wide * size))

    def rows(self, block: slice) -> Array:
        """``M[block]``."""
        size = self.kernel.shape[2]
        first = block.start // size
        dense = BlockCirculant(self.kernel[first : -(-block.stop // size)]).dense()
        return dense[block.start - first * size : block.stop - first * size]

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        return weight @ self.dense()


class Kronecker(NamedTuple):
    """The Kronecker product ``left ⊗ right`` of ``[a, b]`` and ``[c, d]``, of shape ``[a c, b d]``."""

    left: Array
    right: Array

    def apply(self, x: Array) -> Array:
        """``x M^T``."""
        xp = array_namespace(x, self.left, self.right)
        wide = xp.reshape(x, (*x.shape[:-1], self.left.shape[1], self.right.shape[1]))
        inner = xp.matmul(wide, self.right.T)
        turned = xp.matmul(self.left, inner)
        return xp.reshape(turned, (*x.shape[:-1], self.left.shape[0] * self.right.shape[0]))

    def dense(self) -> Array:
        """``M`` itself."""
        xp = array_namespace(self.left, self.right)
        (a, b), (c, d) = self.left.shape, self.right.shape
        return xp.reshape(self.left[:, None, :, None] * self.right[None, :, None, :], (a * c, b * d))

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        return Kronecker(self.left.T, self.right.T).apply(weight)


class Permutation(NamedTuple):
    """``x -> x[order]``: row i of the matrix has its 1 in column ``order[i]``."""

    order: Array

    def apply(self, x: Array) -> Array:
        """``x M^T``."""
        return array_namespace(x).take(x, self.order, axis=-1)

    def dense(self) -> Array:
        """``M`` itself."""
        xp = array_namespace(self.order)
        return xp.take(xp.eye(self.order.shape[0], device=self.order.device), self.order, axis=0)

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        xp = array_namespace(weight)
        return xp.take(weight, xp.argsort(self.order), axis=-1)


class PairRotation(NamedTuple):
    """Rotates pairs of numbers: ``x cos + turned(x) sin``. In groups of ``2 half``, elements i and i + half
    form a pair (a, b), and ``turned`` makes it (-b, a).

    ``cos`` and ``sin`` are ``[n]``. An odd ``width`` is n - 1; its last number is paired with a zero.
    """

    cos: Array
    sin: Array
    half: int
    width: int

    def apply(self, x: Array) -> Array:
        """``x M^T``."""
        x = self._even(x)
        return (x * self.cos + self._exchange(x) * self._signed_sin())[..., : self.width]

    def dense(self) -> Array:
        """``M`` itself."""
        return self.apply(identity(self.width, self.cos)).T

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        weight = self._even(weight)
        return (weight * self.cos + self._exchange(weight * self._signed_sin()))[..., : self.width]

    def _even(self, x: Array) -> Array:
        if self.cos.shape[0] == self.width:
            return x
        xp = array_namespace(x)
        return xp.concat([x, xp.zeros((*x.shape[:-1], 1), dtype=x.dtype, device=x.device)], axis=-1)

    def _signed_sin(self) -> Array:
        """Returns ``sin`` with the sign that its pair takes. Exchanging the halves of ``x`` and negating part
        of ``sin`` costs less, in the backward pass too, than assembling (-b, a).
        """
        xp = array_namespace(self.sin)
        parts = xp.reshape(self.sin, (-1, 2, self.half))
        return xp.reshape(xp.stack([-parts[:, 0, :], parts[:, 1, :]], axis=1), (-1,))

    def _exchange(self, x: Array) -> Array:
        """Exchanges the two numbers of every pair."""
        xp = array_namespace(x)
        return xp.reshape(xp.flip(xp.reshape(x, (*x.shape[:-1], -1, 2, self.half)), axis=-2), x.shape)


class Chain(NamedTuple):
    """The product ``second first``: applies ``first``, then ``second`` to its result."""

    first: Any
    second: Any

    def apply(self, x: Array) -> Array:
        """``x M^T``."""
        return self.second.apply(self.first.apply(x))

    def dense(self) -> Array:
        """``M`` itself."""
        return self.first.after(self.second.dense())

    def rows(self, block: slice) -> Array:
        """``M[block]``."""
        return self.first.after(rows_of(self.second, block))

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        return self.first.after(self.second.after(weight))


class IdentityPlusLowRank(NamedTuple):
    """``I + up down``: the identity plus a low-rank change with ``down`` ``[r, n]`` and ``up`` ``[n, r]``."""

    down: Array
    up: Array

    def apply(self, x: Array) -> Array:
        """``x M^T``."""
        xp = array_namespace(x, self.down, self.up)
        return x + xp.matmul(xp.matmul(x, self.down.T), self.up.T)

    def dense(self) -> Array:
        """``M`` itself."""
        xp = array_namespace(self.down, self.up)
        return identity(self.up.shape[0], self.up) + xp.matmul(self.up, self.down)

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        xp = array_namespace(weight, self.down, self.up)
        return weight + xp.matmul(xp.matmul(weight, self.up), self.down)


class Repeat(NamedTuple):
    """Repeats (or cuts off) a vector of ``width`` numbers until it has ``length``: shape ``[length, width]``.
    ``like`` provides dtype and device.
    """

    width: int
    length: int
    like: Array

    def apply(self, x: Array) -> Array:
        """``x M^T``."""
        xp = array_namespace(x)
        if self.length <= self.width:
            return x[..., : self.length]
        whole, rest = divmod(self.length, self.width)
        return xp.concat([x] * whole + [x[..., :rest]], axis=-1)

    def dense(self) -> Array:
        """``M`` itself."""
        return self.apply(identity(self.width, self.like)).T

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        return BlockSums(self.length, self.width, self.like).apply(weight)


class BlockSums(NamedTuple):
    """Sums the blocks of ``length`` in a vector of ``width`` numbers, the last block padded with zeros: shape
    ``[length, width]``.

    This is the transpose of :class:`Repeat`.
    """

    width: int
    length: int
    like: Array

    def apply(self, x: Array) -> Array:
        """``x M^T``."""
        xp = array_namespace(x)
        lead = x.shape[:-1]
        times, rest = divmod(self.width, self.length)
        whole = xp.sum(xp.reshape(x[..., : times * self.length], (*lead, times, self.length)), axis=-2)
        if not rest:
            return whole
        zeros = xp.zeros((*lead, self.length - rest), dtype=x.dtype, device=x.device)
        return whole + xp.concat([x[..., self.width - rest :], zeros], axis=-1)

    def dense(self) -> Array:
        """``M`` itself."""
        return Repeat(self.length, self.width, self.like).dense().T

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        return Repeat(self.length, self.width, self.like).apply(weight)


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
        left = columns(Dense(operator.left), ids // narrow)
        right = columns(Dense(operator.right), ids % narrow)
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
