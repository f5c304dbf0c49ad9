"""Singular values and vectors of changes by their factors, of many changes at once, and the best approximation of a rank.

A thin QR of both factors leaves an ``R x R`` core whose singular values are those of ``B A`` itself. Equal shapes are stacked and given
to LAPACK together, stacks go to the threads of one pool. Source: Golub and Van Loan, Matrix Computations, section 5.4; optimality, Eckart
and Young 1936.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from ..threads import in_order
from .cut import Cut, energy_of
from .space import Factors

T = TypeVar("T")

_STACK = 1 << 20
"""Numbers of a stack that one thread works on: 8 MB in float64, as much as a core's share of the cache."""
_WELL = 1e-6
"""The least eigenvalue of the columns' correlations above which their Cholesky factor is as good as a QR: it squares the condition, and
in float64 that leaves ``R / 1e-6 * 1e-16``, which is less than float32 can hold."""


class Loss(NamedTuple):
    """What a truncation cut off: the squared singular values beyond the cut (``tail``), and all of them (``total``)."""

    tail: float
    total: float

    @property
    def relative(self) -> float:
        """``sqrt(tail / total)``: the relative Frobenius error, exact by Eckart and Young; 0 for a change that is zero."""
        return float(np.sqrt(self.tail / self.total)) if self.total else 0.0


class Spectrum(NamedTuple):
    """``D = U diag(S) V^T``: ``U`` ``[m, k]``, ``S`` ``[k]`` (float64, falling), ``V`` ``[n, k]``.

    Values that are rounding of the factors are left out, so ``k`` is the numerical rank: 0 for a change that is zero; where few vectors
    were asked for, ``U`` and ``V`` have no more. Of each column of
    ``U`` the largest entry is positive, so that equal changes give equal numbers.
    """

    U: np.ndarray
    S: np.ndarray
    V: np.ndarray

    def cut(self, kept: int) -> tuple[Factors, Loss]:
        """The best approximation of rank ``kept``, its singular values split evenly over the factors, and what that leaves out.

        At least rank 1 is given, of zeros if nothing is kept.
        """
        if not kept or not len(self.S):
            m, n = len(self.U), len(self.V)
            empty = Factors(np.zeros((1, n), self.V.dtype), np.zeros((m, 1), self.U.dtype))
            return empty, Loss(energy_of(self.S), energy_of(self.S))
        halves = np.sqrt(self.S[:kept])
        A, B = (self.V[:, :kept] * halves.astype(self.V.dtype)).T, self.U[:, :kept] * halves.astype(self.U.dtype)
        return Factors(A, B), Loss(energy_of(self.S[kept:]), energy_of(self.S))


def spectrum(change: Factors) -> Spectrum:
    """The singular values and vectors of one change; vectors in the dtype of the factors.

    Example:
        >>> found = spectrum(Factors(np.diag([3.0, 2.0, 0.0]), np.eye(3)))
        >>> found.S, round(found.cut(1)[1].relative ** 2 * 13, 9)
        (array([3., 2.]), 4.0)
    """
    return spectra([change])[0]


def spectra(changes: Sequence[Factors]) -> list[Spectrum]:
    """:func:`spectrum` of many changes, stacked by shape and spread over threads; in the order in which they came."""
    return over_stacks(changes, lambda stack: stack)


def recompress(change: Factors, cut: Cut | None = None) -> tuple[Factors, Loss]:
    """The best approximation of a change that ``cut`` allows, all of it above rounding by default, and what that leaves out.

    Example:
        >>> from adapterpack.compose.cut import Cut
        >>> small, lost = recompress(Factors(np.diag([3.0, 2.0, 1.0]), np.eye(3)), Cut(rank=2))
        >>> small.B.shape, round(lost.relative ** 2, 12) == round(1 / 14, 12)
        ((3, 2), True)
    """
    found = spectrum(change)
    return found.cut((cut or Cut()).kept(found.S))


def over_stacks(changes: Sequence[Factors], then: Callable[[list[Spectrum]], list[T]], most: int | None = None) -> list[T]:
    """``then`` of the spectra of each stack of equal shapes, by the threads; so what follows a spectrum runs beside the next one.

    ``most``: as many vectors as will be kept at the most; further ones are not computed, their singular values are.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, change in enumerate(changes):
        groups.setdefault((change.A.shape, change.B.shape, change.A.dtype, change.B.dtype), []).append(index)
    stacks = []
    for members in groups.values():
        size = max(1, _STACK // max(1, changes[members[0]].A.size + changes[members[0]].B.size))
        stacks += [members[start : start + size] for start in range(0, len(members), size)]
    found: list[T] = [None] * len(changes)  # type: ignore[list-item]
    made = in_order(lambda members: then(_stack_spectra([changes[index] for index in members], most)), stacks)
    for members, values in zip(stacks, made, strict=True):
        for index, value in zip(members, values, strict=True):
            found[index] = value
    return found


def _stack_spectra(changes: Sequence[Factors], most: int | None = None) -> list[Spectrum]:
    """The spectra of changes that have one shape and one rank."""
    first = changes[0]
    if not first.rank:
        return [Spectrum(change.B, np.zeros(0), change.A.T) for change in changes]
    left, left_core, left_well = _frames(np.stack([change.B for change in changes]))
    right, right_core, right_well = _frames(np.stack([change.A.T for change in changes]))
    if len(changes) > 1 and not (left_well and right_well):  # which way a change goes must not depend on its neighbours
        return [_stack_spectra([change], most)[0] for change in changes]
    u, values, vt = np.linalg.svd(left_core @ right_core.transpose(0, 2, 1), full_matrices=False)
    U, V = left(u[:, :, :most]).astype(first.B.dtype), right(vt[:, :most].transpose(0, 2, 1)).astype(first.A.dtype)
    largest = np.take_along_axis(U, np.abs(U).argmax(axis=1)[:, None, :], axis=1)
    signs = np.where(largest < 0, -1, 1).astype(U.dtype)
    U, V = U * signs, V * signs.astype(V.dtype)
    least = _rounding(left_core, right_core, first)
    return [Spectrum(U[i, :, :k], values[i, :k], V[i, :, :k]) for i, k in enumerate(np.count_nonzero(values > least, axis=1))]


def _frames(X: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray, bool]:
    """A thin QR of a stack ``[b, m, R]``: ``Y -> Q Y``, the triangles in float64, and whether all of the stack went one way.

    Well-conditioned columns in float32 are divided by the Cholesky factor of their Gram matrix, in float64: products of matrices only, and
    ``Q`` itself is never formed. All others go through Householder's QR.
    """
    m, R = X.shape[1:]
    if X.dtype == np.float32 and m >= R:
        wide = X.astype(np.float64)
        products = np.matmul(wide.transpose(0, 2, 1), wide)
        sizes = np.sqrt(np.einsum("brr->br", products))
        if sizes.all() and np.isfinite(products).all() and (factored := _triangle(products, sizes)) is not None:
            triangle, back = factored
            return lambda Y: np.matmul(wide, np.matmul(back, Y)), triangle, True
    Q, triangle = np.linalg.qr(X)
    return lambda Y: np.matmul(Q, Y.astype(Q.dtype)), triangle.astype(np.float64), X.dtype != np.float32 or m < R


def _triangle(products: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The Cholesky factors, and their inverses, of Gram matrices ``[b, R, R]`` of columns of these lengths; None where columns are nearly
    dependent.

    The least eigenvalue of the correlations ``C = L L^T`` is at least one over the trace of ``C^-1``, the sum of the squares of ``L^-1``.
    """
    try:
        factor = np.linalg.cholesky(products / (sizes[:, :, None] * sizes[:, None, :]))
        back = np.linalg.inv(factor)
    except np.linalg.LinAlgError:
        return None
    if not np.sum(back**2, axis=(1, 2)).max() < 1 / _WELL:
        return None
    return factor.transpose(0, 2, 1) * sizes[:, None, :], back.transpose(0, 2, 1) / sizes[:, :, None]


def _rounding(left: np.ndarray, right: np.ndarray, like: Factors) -> np.ndarray:
    """``[b, 1]``: the size below which a singular value is rounding: a few units of the dtype on the rank-one terms of ``B A``, summed as
    noise is; ``left`` and ``right`` are the triangles, whose columns are as long as those of the factors.

    What is computed in float64 throughout rounds more often than once, at the scale of the whole. The size is told from the terms and not
    from the largest singular value, so that changes that cancel come out as zero.
    """
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    unit = max(np.finfo(like.A.dtype).eps, np.finfo(like.B.dtype).eps)
    often = 16 if unit < np.finfo(np.float32).eps else 2
    size: np.ndarray = often * float(unit) * np.linalg.norm(lengths, axis=1)[:, None]
    return size
