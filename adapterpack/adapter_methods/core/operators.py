"""The structured matrices of the normal form: what ``pre``, ``down`` and ``up`` may be.

Each operator is a value over one array of any array-API library. Nothing wide is materialised unless
``dense`` is called.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from .arrays import array_namespace

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
        """``weight M``: what a dense weight ``[k, out]`` becomes when ``M`` acts on its input; shape ``[k,
        in]``.
        """
        ...


class Dense(NamedTuple):
    """A plain matrix ``factor * stored``, ``[out, in]``: multiplied only where the product is needed."""

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
    """``diag(left) matrix diag(right)``: a matrix ``[out, in]`` that may be a constant, and vectors ``[out]``
    and ``[in]``.
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
        xp = array_namespace(self.vector)
        return xp.eye(self.vector.shape[0], dtype=self.vector.dtype, device=self.vector.device) * self.vector

    def rows(self, block: slice) -> Array:
        """``M[block]``."""
        return self.dense()[block]

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        return weight * self.vector


class BlockDiagonal(NamedTuple):
    """Blocks ``[n, b_out, b_in]`` along the diagonal: shape ``[n b_out, n b_in]``."""

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
        spread = (
            xp.eye(count, dtype=self.blocks.dtype, device=self.blocks.device)[:, None, :, None]
            * self.blocks[:, :, None, :]
        )
        return xp.reshape(spread, (count * wide, count * narrow))

    def rows(self, block: slice) -> Array:
        """``M[block]``."""
        return self.dense()[block]

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        return transpose(self).apply(weight)


class BlockCirculant(NamedTuple):
    """Blocks whose rows are one row turned on: ``kernel`` ``[m, n, b]`` is ``M[i b + t, j b + s] = kernel[i,
    j, (s - t) mod b]``.
    """

    kernel: Array

    def apply(self, x: Array) -> Array:
        """``x M^T``; by the convolution theorem, in at least float32."""
        xp = array_namespace(x, self.kernel)
        tall, wide, size = self.kernel.shape
        if 0 in x.shape[:-1]:  # some libraries' transforms refuse to do nothing
            return xp.zeros((*x.shape[:-1], tall * size), dtype=x.dtype, device=x.device)
        exact = x.dtype if x.dtype == xp.float64 else xp.float32
        inputs = xp.fft.rfft(xp.astype(xp.reshape(x, (-1, wide, size)), exact, copy=False))
        kernel = xp.conj(xp.fft.rfft(xp.astype(self.kernel, exact, copy=False)))
        if wide == 1:
            outputs = inputs * kernel[:, 0, :]
        else:  # one product for every frequency
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
        # A periodic sequence cut into rows that are one short of two periods: each row begins one place
        # earlier than the one before.
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
    """``left ⊗ right`` of ``[a, b]`` and ``[c, d]``: shape ``[a c, b d]``."""

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

    def rows(self, block: slice) -> Array:
        """``M[block]``."""
        return self.dense()[block]

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        return transpose(self).apply(weight)


class Permutation(NamedTuple):
    """``x -> x[order]``: row i of the matrix is one at ``order[i]``."""

    order: Array

    def apply(self, x: Array) -> Array:
        """``x M^T``."""
        return array_namespace(x).take(x, self.order, axis=-1)

    def dense(self) -> Array:
        """``M`` itself."""
        xp = array_namespace(self.order)
        return xp.take(xp.eye(self.order.shape[0], device=self.order.device), self.order, axis=0)

    def rows(self, block: slice) -> Array:
        """``M[block]``."""
        return self.dense()[block]

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        xp = array_namespace(weight)
        return xp.take(weight, xp.argsort(self.order), axis=-1)


class PairRotation(NamedTuple):
    """Numbers turned in pairs: ``x cos + turned(x) sin``; in groups of ``2 half``, i and i + half are a pair
    (a, b), turned to (-b, a).

    ``cos`` and ``sin`` are ``[n]``; of an odd ``width`` n - 1 the last number is paired with a zero.
    """

    cos: Array
    sin: Array
    half: int
    width: int

    def apply(self, x: Array) -> Array:
        """``x M^T``."""
        xp = array_namespace(x, self.sin)
        x = self._even(x)
        # Exchanging the two and changing the sign of a vector: less work, backward too, than putting (-b, a)
        # together.
        parts = xp.reshape(self.sin, (-1, 2, self.half))
        signed_sin = xp.reshape(xp.stack([-parts[:, 0, :], parts[:, 1, :]], axis=1), (-1,))
        exchanged = xp.reshape(xp.flip(xp.reshape(x, (*x.shape[:-1], -1, 2, self.half)), axis=-2), x.shape)
        turned = x * self.cos + exchanged * signed_sin
        return turned if turned.shape[-1] == self.width else turned[..., : self.width]

    def dense(self) -> Array:
        """``M`` itself."""
        xp = array_namespace(self.cos)
        return self.apply(xp.eye(self.width, dtype=self.cos.dtype, device=self.cos.device)).T

    def rows(self, block: slice) -> Array:
        """``M[block]``."""
        return self.dense()[block]

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        weight = self._even(weight)
        return (weight * self.cos - self._turned(weight * self.sin))[..., : self.width]

    def _even(self, x: Array) -> Array:
        if self.cos.shape[0] == self.width:
            return x
        xp = array_namespace(x)
        return xp.concat([x, xp.zeros((*x.shape[:-1], 1), dtype=x.dtype, device=x.device)], axis=-1)

    def _turned(self, x: Array) -> Array:
        xp = array_namespace(x)
        groups = xp.reshape(x, (*x.shape[:-1], -1, 2, self.half))
        return xp.reshape(xp.stack([-groups[..., 1, :], groups[..., 0, :]], axis=-2), x.shape)


class Chain(NamedTuple):
    """``second first``: what ``first`` gives goes through ``second``."""

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
        return self.first.after(self.second.rows(block))

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        return self.first.after(self.second.after(weight))


class IdentityPlusLowRank(NamedTuple):
    """``I + up down``: the identity and a change of low rank, ``down`` ``[r, n]`` and ``up`` ``[n, r]``."""

    down: Array
    up: Array

    def apply(self, x: Array) -> Array:
        """``x M^T``."""
        xp = array_namespace(x, self.down, self.up)
        return x + xp.matmul(xp.matmul(x, self.down.T), self.up.T)

    def dense(self) -> Array:
        """``M`` itself."""
        xp = array_namespace(self.down, self.up)
        return xp.eye(self.up.shape[0], dtype=self.up.dtype, device=self.up.device) + xp.matmul(
            self.up, self.down
        )

    def rows(self, block: slice) -> Array:
        """``M[block]``."""
        return self.dense()[block]

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        xp = array_namespace(weight, self.down, self.up)
        return weight + xp.matmul(xp.matmul(weight, self.up), self.down)


class Repeat(NamedTuple):
    """``width`` numbers repeated, or cut off, until they are ``length``: shape ``[length, width]``; ``like``
    gives dtype and device.
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
        xp = array_namespace(self.like)
        return self.apply(xp.eye(self.width, dtype=self.like.dtype, device=self.like.device)).T

    def rows(self, block: slice) -> Array:
        """``M[block]``."""
        return self.dense()[block]

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        return BlockSums(self.length, self.width, self.like).apply(weight)


class BlockSums(NamedTuple):
    """The blocks of ``length`` among ``width`` numbers added, the last one filled up with zeros: shape
    ``[length, width]``.

    The transpose of :class:`Repeat`.
    """

    width: int
    length: int
    like: Array

    def apply(self, x: Array) -> Array:
        """``x M^T``."""
        xp, lead = array_namespace(x), x.shape[:-1]
        times, rest = divmod(self.width, self.length)
        whole = xp.sum(xp.reshape(x[..., : times * self.length], (*lead, times, self.length)), axis=-2)
        if not rest:
            return whole
        zeros = xp.zeros((*lead, self.length - rest), dtype=x.dtype, device=x.device)
        return whole + xp.concat([x[..., self.width - rest :], zeros], axis=-1)

    def dense(self) -> Array:
        """``M`` itself."""
        return Repeat(self.length, self.width, self.like).dense().T

    def rows(self, block: slice) -> Array:
        """``M[block]``."""
        return self.dense()[block]

    def after(self, weight: Array) -> Array:
        """``weight M``."""
        return Repeat(self.length, self.width, self.like).apply(weight)


def transpose(operator: BlockDiagonal | Kronecker) -> Any:
    """``M^T`` as an operator of the same structure."""
    if isinstance(operator, Kronecker):
        return Kronecker(operator.left.T, operator.right.T)
    return BlockDiagonal(array_namespace(operator.blocks).permute_dims(operator.blocks, (0, 2, 1)))
