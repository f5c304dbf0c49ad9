"""The structured matrices of the normal form: what ``pre``, ``down`` and ``up`` may be.

Each operator is a value over one array of any array-API library. Nothing wide is materialised unless ``dense`` is asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from array_api_compat import array_namespace

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
        return xp.eye(self.vector.shape[0], dtype=self.vector.dtype) * self.vector

    def rows(self, block: slice) -> Array:
        """See :class:`Operator`."""
        return self.dense()[block]

    def after(self, weight: Array) -> Array:
        """See :class:`Operator`."""
        return weight * self.vector
