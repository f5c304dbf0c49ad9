"""The factor space: sums of low-rank changes handled by their factors, so that nothing of the size of a weight is ever formed.

A change is ``D = B A`` with ``B`` ``[m, R]`` and ``A`` ``[R, n]``; the factors of several adapters are stacked along ``R``. A thin QR on
both sides leaves an ``R x R`` core whose singular values are those of ``D`` itself. Cost ``O((m + n) R^2 + R^3)``, memory ``O((m + n) R)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Term(NamedTuple):
    """One adapter's part at a site: ``A`` ``[r, n]``, ``B`` ``[m, r]`` with the adapter's own scale inside, and its weight, of any sign.

    An adapter that does not change the site has rank 0 there.
    """

    A: np.ndarray
    B: np.ndarray
    weight: float


class Factors(NamedTuple):
    """A change as its factors: ``D = B A``, ``A`` ``[R, n]`` and ``B`` ``[m, R]``."""

    A: np.ndarray
    B: np.ndarray


class Loss(NamedTuple):
    """What a truncation cut off: the squared singular values beyond the cut (``tail``), and all of them (``total``)."""

    tail: float
    total: float

    @property
    def relative(self) -> float:
        """``sqrt(tail / total)``: the relative Frobenius error, exact by Eckart and Young; 0 for a change that is zero."""
        return float(np.sqrt(self.tail / self.total)) if self.total else 0.0


def stack(terms: Sequence[Term]) -> Factors:
    """The factors of ``sum_i w_i B_i A_i``: ``A`` ``[sum r_i, n]``, and ``B`` ``[m, sum r_i]`` with the weights inside.

    Example:
        >>> one, two = np.ones((1, 3)), np.ones((2, 1))
        >>> total = stack([Term(one, two, 2.0), Term(one, two, -0.5)])
        >>> total.B @ total.A
        array([[1.5, 1.5, 1.5],
               [1.5, 1.5, 1.5]])
    """
    return Factors(np.concatenate([term.A for term in terms], axis=0), np.concatenate([term.weight * term.B for term in terms], axis=1))


def recompress(
    A: np.ndarray, B: np.ndarray, *, rank: int | None = None, energy: float | None = None
) -> tuple[np.ndarray, np.ndarray, Loss]:
    """The best approximation of ``B A`` of a rank: ``(A, B, lost)``, in the dtype that came in, with the singular values split evenly.

    ``rank`` keeps that many singular values; ``energy`` (0 to 1) the fewest whose squares make up that share of all squares; with neither,
    all that stand above rounding stay. At least rank 1 is returned, of zeros if the change is zero. The QR is made in the dtype of the
    factors, the core in float64. The signs are fixed (the largest entry of each left vector is positive), so that equal input gives equal
    bytes. Source: thin QR and core SVD, Golub and Van Loan, Matrix Computations, section 5.4; optimality, Eckart and Young 1936.

    Example:
        >>> A, B, lost = recompress(np.diag([3.0, 2.0, 1.0]), np.eye(3), rank=2)
        >>> B.shape, round(lost.relative ** 2, 12) == round(1 / 14, 12)
        ((3, 2), True)
    """
    left, left_core = np.linalg.qr(B)
    right, right_core = np.linalg.qr(A.T)
    u, values, vt = np.linalg.svd(left_core.astype(np.float64) @ right_core.astype(np.float64).T, full_matrices=False)
    values = np.where(values > _rounding(A, B), values, 0.0)
    squares = values**2
    total = float(squares.sum())
    kept = int(np.count_nonzero(values))
    if rank is not None:
        kept = min(kept, rank)
    if energy is not None:
        kept = min(kept, int(np.searchsorted(np.cumsum(squares), energy * total)) + 1)
    kept = max(1, kept)
    up, down = left @ u[:, :kept].astype(B.dtype), right @ vt[:kept].T.astype(A.dtype)
    signs = np.sign(up[np.argmax(np.abs(up), axis=0), np.arange(kept)])
    halves = np.sqrt(values[:kept])
    return (down * (signs * halves).astype(A.dtype)).T, up * (signs * halves).astype(B.dtype), Loss(float(squares[kept:].sum()), total)


def _rounding(A: np.ndarray, B: np.ndarray) -> float:
    """The size below which a singular value of ``B A`` is rounding: a few units of the dtype on its rank-one terms, summed as noise is.

    It is told from the terms and not from the largest singular value, so that changes that cancel come out as zero.
    """
    terms = np.linalg.norm(A.astype(np.float64), axis=1) * np.linalg.norm(B.astype(np.float64), axis=0)
    return 2 * float(max(np.finfo(A.dtype).eps, np.finfo(B.dtype).eps)) * float(np.linalg.norm(terms))
