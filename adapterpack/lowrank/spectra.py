"""Computes singular values and vectors of many low-rank changes from their factors, and their best
approximations of lower rank.

A thin QR of both factors leaves an ``R x R`` core whose singular values are those of ``B A``. Changes of
equal shape are stacked and passed to LAPACK together, and the stacks are distributed over the threads of one
pool. Source: Golub and Van Loan, Matrix Computations, section 5.4; optimality, Eckart and Young 1936.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..io import in_order
from .factors import Factors, FactorSum, Side
from .truncation import Cut, energy_of

T = TypeVar("T")

_STACK = 1 << 20
"""Numbers per stack that one thread processes: many sites per call, because every call waits for the
interpreter's lock.
"""
_WELL = 1e-6
"""The smallest eigenvalue of the columns' correlation matrix above which its Cholesky factor is as accurate
as a QR. Cholesky squares the condition number, which in float64 leaves an error of ``R / 1e-6 * 1e-16``,
below the precision of float32.
"""


class Loss(NamedTuple):
    """What a truncation removed: the sum of the squared singular values beyond the cut (``tail``), and of all
    of them (``total``).
    """

    tail: float
    total: float

    @property
    def relative(self) -> float:
        """``sqrt(tail / total)``: the relative Frobenius error, exact by Eckart and Young; 0 for a zero
        change.
        """
        return float(np.sqrt(self.tail / self.total)) if self.total else 0.0


class Spectrum(NamedTuple):
    """A singular value decomposition ``D = U diag(S) V^T``: ``U`` ``[m, k]``, ``S`` ``[k]`` (float64,
    descending), ``V`` ``[n, k]``.

    Values that are only rounding errors of the factors are dropped, so ``k`` is the numerical rank: 0 for a
    zero change. The largest entry of each column of ``U`` is positive, so that equal changes give equal
    numbers.
    """

    U: np.ndarray
    S: np.ndarray
    V: np.ndarray

    def cut(self, kept: int) -> tuple[Factors, Loss]:
        """Returns the best approximation of rank ``kept``, with the singular values divided evenly between
        the factors, and its loss.

        The factors have at least rank 1; they are zero if nothing is kept.
        """
        if not kept or not len(self.S):
            m, n = len(self.U), len(self.V)
            empty = Factors(np.zeros((1, n), self.V.dtype), np.zeros((m, 1), self.U.dtype))
            return empty, Loss(energy_of(self.S), energy_of(self.S))
        halves = np.sqrt(self.S[:kept])
        A = (self.V[:, :kept] * halves.astype(self.V.dtype)).T
        B = self.U[:, :kept] * halves.astype(self.U.dtype)
        return Factors(A, B), Loss(energy_of(self.S[kept:]), energy_of(self.S))


Change = Factors | FactorSum
"""A change by its factors, concatenated or not."""


def spectrum(change: Change) -> Spectrum:
    """Computes the singular values and vectors of one change; the vectors have the dtype of the factors.

    Example:
        >>> svd = spectrum(Factors(np.diag([3.0, 2.0, 0.0]), np.eye(3)))
        >>> svd.S, round(svd.cut(1)[1].relative ** 2 * 13, 9)
        (array([3., 2.]), 4.0)
    """
    return spectra([change])[0]


def spectra(changes: Sequence[Change]) -> list[Spectrum]:
    """Computes :func:`spectrum` of many changes, stacked by shape and distributed over threads; the results
    are in the order of the changes.
    """
    return over_stacks(changes, _stack_spectra)


def recompress_all(changes: Sequence[Change], cut: Cut) -> list[tuple[Factors, Loss]]:
    """Returns the best approximation of each change that ``cut`` allows, and its loss. Changes are stacked by
    shape and distributed over threads, and vectors that are not kept are not computed.

    Example:
        >>> from adapterpack.lowrank.truncation import Cut
        >>> ((small, lost),) = recompress_all([Factors(np.diag([3.0, 2.0, 1.0]), np.eye(3))], Cut(rank=2))
        >>> small.B.shape, round(lost.relative ** 2, 12) == round(1 / 14, 12)
        ((3, 2), True)
    """
    return over_stacks(changes, lambda stack: _cut_stack(stack, cut))


def over_stacks(changes: Sequence[Change], work: Callable[[list[Change]], list[T]]) -> list[T]:
    """Applies ``work`` in threads to stacks of changes with equal shape, rank and dtype; returns the results
    in the order of the changes.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, change in enumerate(changes):
        groups.setdefault(
            tuple((part.shape, part.dtype) for part in (*change.left.parts, *change.right.parts)), []
        ).append(index)
    stacks = []
    for members in groups.values():
        first = changes[members[0]]
        # Many small changes share one LAPACK call, while a large change is a stack of its own.
        size = max(1, _STACK // max(1, first.rank * sum(first.shape)))
        stacks += [members[start : start + size] for start in range(0, len(members), size)]
    results: list[T] = [None] * len(changes)  # type: ignore[list-item]
    made = in_order(lambda members: work([changes[index] for index in members]), stacks)
    for members, values in zip(stacks, made, strict=True):
        for index, value in zip(members, values, strict=True):
            results[index] = value
    return results


class _Stack(NamedTuple):
    """The decompositions ``D_i = Q_i u_i diag(S_i) vt_i P_i^T`` of a stack. ``left(Y)`` returns ``Q Y`` with
    the signs that make the largest entry of each column positive, and these signs; ``right(Y)`` returns ``Y
    P^T``; ``ranks`` counts the values of ``S`` above rounding.
    """

    left: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    right: Callable[[np.ndarray], np.ndarray]
    u: np.ndarray
    S: np.ndarray
    vt: np.ndarray
    ranks: np.ndarray


def _decompose(changes: Sequence[Change]) -> _Stack | None:
    """Decomposes changes of equal shape and dtype with one rank above 0.

    Returns None if some changes of the stack need a different algorithm from the others: the algorithm for a
    change must not depend on the other changes in its stack.
    """
    lefts = [change.left for change in changes]
    rights = [change.right for change in changes]
    (left, left_core), (right, right_core) = frames(lefts), frames(rights)
    tried = _narrow(lefts[0]), _narrow(rights[0])
    if len(changes) > 1 and any(
        frame.back is None and is_narrow for frame, is_narrow in zip((left, right), tried, strict=True)
    ):
        return None
    # B A = (Q_left R_left)(Q_right R_right)^T, so the core has the singular values of B A.
    core = left_core @ right_core.transpose(0, 2, 1)
    # overflow: NaN makes it visible in the result, where LAPACK would only raise an error
    if not np.isfinite(core).all():
        if len(changes) > 1:
            return None
        core = np.full_like(core, np.nan)
        return _Stack(left.signed, right.times, core, core[:, 0], core, np.array([core.shape[1]]))
    u, values, vt = np.linalg.svd(core, full_matrices=False)
    unit = max(np.finfo(part.dtype).eps for part in (*lefts[0].parts, *rights[0].parts))
    ranks = np.count_nonzero(values > _rounding(left_core, right_core, float(unit)), axis=1)
    return _Stack(left.signed, right.times, u, values, vt, ranks)


def _stack_spectra(changes: Sequence[Change]) -> list[Spectrum]:
    first = changes[0]
    if not first.rank:
        return [Spectrum(change.joined().B, np.zeros(0), change.joined().A.T) for change in changes]
    decomposed = _decompose(changes)
    if decomposed is None:
        return [_stack_spectra([change])[0] for change in changes]
    U, signs = decomposed.left(decomposed.u)
    V = decomposed.right(decomposed.vt * signs[:, :, None])
    return [Spectrum(U[i, :, :k], decomposed.S[i, :k], V[i, :k].T) for i, k in enumerate(decomposed.ranks)]


def _cut_stack(changes: Sequence[Change], cut: Cut) -> list[tuple[Factors, Loss]]:
    first = changes[0]
    if not first.rank:
        return [zero.cut(0) for zero in _stack_spectra(changes)]
    decomposed = _decompose(changes)
    if decomposed is None:
        return [_cut_stack([change], cut)[0] for change in changes]
    values = [S[:k] for S, k in zip(decomposed.S, decomposed.ranks, strict=True)]
    # `most` and not what is kept: products of other sizes may round differently
    most = first.rank if cut.rank is None else min(cut.rank, first.rank)
    kept = [most if np.isnan(S).any() else cut.kept(S) for S in values]
    halves = np.sqrt(decomposed.S[:, :most])
    B, signs = decomposed.left(decomposed.u[:, :, :most] * halves[:, None, :])
    A = decomposed.right(decomposed.vt[:, :most] * (signs * halves)[:, :, None])
    made = []
    for i, (k, S) in enumerate(zip(kept, values, strict=True)):
        factors = (
            Factors(A[i, :k], B[i, :, :k])
            if k
            else Factors(np.zeros_like(A[i, :1]), np.zeros_like(B[i, :, :1]))
        )
        made.append((factors, Loss(energy_of(S[k:]), energy_of(S))))
    return made


class Frame(NamedTuple):
    """Orthonormal columns ``Q`` of each matrix ``[m, R]`` of a stack, as ``X @ back`` in float64, or as ``X``
    alone, which may be float32.

    ``Q Y`` is computed from both in float64 and rounded to ``dtype`` once. ``turned``: the columns are
    returned as rows.
    """

    X: np.ndarray
    back: np.ndarray | None
    dtype: np.dtype[Any]
    turned: bool

    def times(self, Y: np.ndarray) -> np.ndarray:
        """Returns ``Q Y`` for ``Y`` ``[b, R, k]``, or if ``turned`` ``Y Q^T`` for ``Y`` ``[b, k, R]``; in C
        order.
        """
        if self.turned:
            coordinates = Y if self.back is None else np.matmul(Y, self.back.transpose(0, 2, 1))
            product: np.ndarray = np.matmul(coordinates, self.X.transpose(0, 2, 1))
        else:
            product = np.matmul(self.X, Y if self.back is None else np.matmul(self.back, Y))
        return product.astype(self.dtype, copy=False)

    def signed(self, Y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns ``Q Y`` with each column multiplied by the sign that makes its largest entry positive, and
        these signs ``[b, k]``.
        """
        U = self.times(Y)
        signs = np.where(U.max(axis=1) < -U.min(axis=1), -1.0, 1.0)
        np.multiply(U, signs[:, None, :].astype(U.dtype), out=U)
        return U, signs


def frames(sides: Sequence[Side]) -> tuple[Frame, np.ndarray]:
    """Computes a thin QR of each of several ``[m, R]`` (or ``turned`` ``[R, m]``, as columns) whose parts
    have equal shapes and dtypes; returns the frames and the triangles in float64, both stacked.

    Well-conditioned float32 columns are divided by the Cholesky factor of their Gram matrix in float64, which
    needs only matrix products. All others use Householder's QR.
    """
    turned = sides[0].turned
    if _narrow(sides[0]):
        X = np.stack([side.joined(np.float64) for side in sides])
        X = X.transpose(0, 2, 1) if turned else X
        if (factored := _cholesky(np.matmul(X.transpose(0, 2, 1), X))) is not None:
            triangle, back = factored
            return Frame(X, back, np.dtype(np.float32), turned), triangle
    stacked = np.stack([side.joined() for side in sides])
    Q, triangle = np.linalg.qr(stacked.transpose(0, 2, 1) if turned else stacked)
    return Frame(Q, None, Q.dtype, turned), triangle.astype(np.float64)


def _cholesky(grams: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the Cholesky factors ``U``, ``U^T U = G``, of Gram matrices ``[b, R, R]`` and their inverses,
    both upper triangular; None if the columns of one matrix are nearly dependent or not finite.

    The factorisation uses the correlations ``C``. One over the trace of ``C^-1``, which is the sum of the
    squares of the factor's inverse, is at most the smallest eigenvalue of ``C``; it must exceed
    :data:`_WELL`.
    """
    lengths = np.sqrt(np.einsum("brr->br", grams))
    if not lengths.all() or not np.isfinite(grams).all():
        return None
    try:
        factor = np.linalg.cholesky(grams / (lengths[:, :, None] * lengths[:, None, :]))
        back = np.linalg.inv(factor)
    except np.linalg.LinAlgError:
        return None
    if not np.sum(back**2, axis=(1, 2)).max() < 1 / _WELL:
        return None
    return factor.transpose(0, 2, 1) * lengths[:, None, :], back.transpose(0, 2, 1) / lengths[:, :, None]


def _narrow(side: Side) -> bool:
    """Whether to try the Cholesky factor: the parts are float32, and the matrix has at least as many rows as
    columns.
    """
    return (
        all(part.dtype == np.float32 for part in side.parts)
        and side.parts[0].shape[side.turned] >= side.columns
    )


def _rounding(left: np.ndarray, right: np.ndarray, unit: float) -> np.ndarray:
    """Returns the size below which a singular value is only rounding, ``[b, 1]``: a few units of the dtype
    (``unit``) on each rank-one term of ``B A``, summed like independent noise. ``left`` and ``right`` are the
    triangles, whose columns have the lengths of the factors' columns.

    Computations in float64 throughout round more than once, at the scale of the sum. The size follows from
    the terms and not from the largest singular value, so that changes that cancel give zero.
    """
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    often = 16 if unit < np.finfo(np.float32).eps else 2
    size: np.ndarray = often * unit * np.linalg.norm(lengths, axis=1)[:, None]
    return size
