"""Works with sums of low-rank changes through their factors, so that no array of the size of a weight is
formed.

A change is ``D = B A`` with ``B`` ``[m, R]`` and ``A`` ``[R, n]``. A rule of combination may use, for the
changes at one site:

- :func:`weighted_sum`, :func:`stack`: the weighted sum; costs only copies of the factors.
- :func:`gram`, :func:`row_gram`, :func:`column_gram`: inner products ``<D_i, D_j>``; ``O((m + n) R^2)``.
- :func:`core`: all changes in their joint bases; ``O((m + n) R^2)``.
- :func:`angles`: principal angles of two changes; ``O((m + n) r^2)``.
- :meth:`Factors.rows`, :func:`blocks`: rows of the dense change, a block at a time; ``O(rows n R)``.
- :mod:`.spectra`: singular values and vectors, truncation; ``O((m + n) R^2 + R^3)``.

All results depend on the changes alone and not on how they are factored (``B M^-1``, ``M A`` is the same
change), except for :func:`stack`, of which only the *product* is independent of it. Inner products and cores
are float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..adapter_methods import row_blocks


class Factors(NamedTuple):
    """A change as its factors: ``D = B A``, ``A`` ``[R, n]`` and ``B`` ``[m, R]``; a zero change has rank 0.

    Example:
        >>> change = Factors(np.ones((1, 3)), np.ones((2, 1)))
        >>> change.shape, change.rank, change.dense().sum()
        ((2, 3), 1, np.float64(6.0))
    """

    A: np.ndarray
    B: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``, the shape of ``D``."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """``R``, the inner dimension: the rank of ``D`` or more."""
        return int(self.A.shape[0])

    def rows(self, block: slice | np.ndarray) -> np.ndarray:
        """Returns the rows ``D[block]``."""
        product: np.ndarray = self.B[block] @ self.A
        return product

    def dense(self) -> np.ndarray:
        """Returns the full ``D``: for tests, and for small changes."""
        return self.rows(slice(None))

    @property
    def left(self) -> Side:
        """``B``, as a :class:`Side` with one part."""
        return Side((self.B,), (1.0,))

    @property
    def right(self) -> Side:
        """``A``, as a :class:`Side` with one part."""
        return Side((self.A,), (1.0,), turned=True)

    def joined(self) -> Factors:
        """Returns itself; :meth:`FactorSum.joined` concatenates its parts."""
        return self

    def scaled(self, weight: float) -> Factors:
        """Returns ``weight D``."""
        return Factors(self.A, weight * self.B)


def times(matrix: np.ndarray, factor: float) -> np.ndarray:
    """Returns ``factor * matrix`` in the dtype of the matrix; the matrix itself if the factor is 1."""
    return matrix if factor == 1 else matrix * matrix.dtype.type(factor)


class Term(NamedTuple):
    """One adapter's contribution at a site: ``A`` ``[r, n]``, ``B`` ``[m, r]`` including the adapter's own
    scale, and its weight, of any sign.

    An adapter that does not change the site has rank 0 there. ``key`` identifies adapter and site, and seeds
    random choices. ``branch_scale`` is the adapter's own scale, for rules that look at the stored factors
    separately; ``B`` already includes it. ``measured`` holds the statistics (:mod:`.statistics`) of the
    adapter at the site, for rules that use data. ``B`` is ``factor * up``, stored unmultiplied so that sums
    need no copy. ``own`` holds parameters of the rule that this adapter has for itself at this site.
    """

    A: np.ndarray
    up: np.ndarray
    weight: float
    key: str = ""
    branch_scale: float = 1.0
    measured: np.ndarray | None = None
    factor: float = 1.0
    own: Mapping[str, float] = {}

    @property
    def B(self) -> np.ndarray:  # noqa: N802 - as it is called everywhere
        """``factor * up``."""
        return times(self.up, self.factor)

    @property
    def change(self) -> Factors:
        """The change itself, without the weight."""
        return Factors(self.A, self.B)


Terms = Sequence[Term]
RowBlocks = Iterator[tuple[slice, np.ndarray]]
"""Blocks of consecutive rows of a matrix, with the rows' places."""


def zero(m: int, n: int, dtype: type = np.float32) -> Factors:
    """Returns the change of rank 0 of a site ``[m, n]``."""
    return Factors(np.zeros((0, n), dtype), np.zeros((m, 0), dtype))


class Side(NamedTuple):
    """One factor of a sum, ``[m, R]`` or ``turned`` ``[R, n]``, as parts that are not yet concatenated, each
    with its weight.
    """

    parts: tuple[np.ndarray, ...]
    weights: tuple[float, ...]
    turned: bool = False

    @property
    def columns(self) -> int:
        """``R``, the total rank of the parts."""
        return sum(part.shape[not self.turned] for part in self.parts)

    def joined(self, dtype: type | None = None) -> np.ndarray:
        """Concatenates the parts, by default in their widest dtype, and multiplies in the weights in that
        dtype.
        """
        made = np.concatenate(self.parts, axis=int(not self.turned), dtype=dtype)
        end = 0
        for part, weight in zip(self.parts, self.weights, strict=True):
            start = end
            end += part.shape[not self.turned]
            block = made[start:end] if self.turned else made[:, start:end]
            if weight != 1:
                np.multiply(block, weight, out=block)
        return made


class FactorSum(NamedTuple):
    """``sum_i w_i B_i A_i`` as separate terms; :meth:`joined` concatenates them as :func:`stack` does.

    Example:
        >>> one, two = np.ones((1, 3)), np.ones((2, 1))
        >>> total = weighted_sum([Term(one, two, 2.0), Term(one, two, -0.5)])
        >>> total.shape, total.rank, total.joined().dense()[0]
        ((2, 3), 2, array([1.5, 1.5, 1.5]))
    """

    terms: tuple[Term, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``, the shape of the sum."""
        return self.terms[0].up.shape[0], self.terms[0].A.shape[1]

    @property
    def rank(self) -> int:
        """``R``, the sum of the ranks of the terms."""
        return sum(len(term.A) for term in self.terms)

    @property
    def left(self) -> Side:
        """The factor ``B`` of the sum."""
        return Side(
            tuple(term.up for term in self.terms), tuple(term.weight * term.factor for term in self.terms)
        )

    @property
    def right(self) -> Side:
        """The factor ``A`` of the sum."""
        return Side(tuple(term.A for term in self.terms), (1.0,) * len(self.terms), turned=True)

    def joined(self) -> Factors:
        """Concatenates the factors of all terms."""
        return Factors(self.right.joined(), self.left.joined())


def weighted_sum(terms: Terms) -> FactorSum:
    """Returns ``sum_i w_i B_i A_i``. A term of weight 0 is dropped, unless all are."""
    return FactorSum(tuple(term for term in terms if term.weight and len(term.A)) or tuple(terms[:1]))


def stack(terms: Terms) -> Factors:
    """Returns the factors of ``sum_i w_i B_i A_i``: ``A`` ``[sum r_i, n]``, and ``B`` ``[m, sum r_i]`` with
    the weights multiplied in.

    A term of weight 0 is dropped, unless all are.

    Example:
        >>> one, two = np.ones((1, 3)), np.ones((2, 1))
        >>> total = stack([Term(one, two, 2.0), Term(one, two, -0.5)])
        >>> total.B @ total.A
        array([[1.5, 1.5, 1.5],
               [1.5, 1.5, 1.5]])
    """
    return weighted_sum(terms).joined()


def inner(first: Factors, second: Factors) -> float:
    """Returns ``<D_1, D_2> = sum((B_1^T B_2) * (A_1 A_2^T))`` in float64.

    Example:
        >>> change = Factors(np.ones((1, 3)), np.ones((2, 1)))
        >>> inner(change, change.scaled(-2.0))
        -12.0
    """
    return float(np.sum(_wide(first.B).T @ _wide(second.B) * (_wide(first.A) @ _wide(second.A).T)))


def gram(terms: Terms) -> np.ndarray:
    """Returns the inner products ``<D_i, D_j>`` of the changes without their weights: ``[T, T]``, float64,
    symmetric.

    Example:
        >>> one, two = np.ones((1, 3)), np.ones((2, 1))
        >>> gram([Term(one, two, 1.0), Term(-one, two, 1.0)])
        array([[ 6., -6.],
               [-6.,  6.]])
    """
    A, B = _join_factors(terms)
    return _by_term(terms, (B.T @ B) * (A @ A.T))


def row_gram(terms: Terms) -> np.ndarray:
    """Returns, for every output, the inner products of the rows of ``D_i`` and ``D_j``: ``[m, T, T]``,
    float64.
    """
    products = [[_wide(i.A) @ _wide(j.A).T for j in terms] for i in terms]
    wide = [_wide(term.B) for term in terms]
    rows = [
        [np.vecdot(left @ product, right) for right, product in zip(wide, line, strict=True)]
        for left, line in zip(wide, products, strict=True)
    ]
    return np.moveaxis(np.array(rows), 2, 0)


def column_gram(terms: Terms) -> np.ndarray:
    """Returns, for every input, the inner products of the columns of ``D_i`` and ``D_j``: ``[n, T, T]``,
    float64.
    """
    return row_gram([Term(term.B.T, term.A.T, term.weight) for term in terms])


class JointCore(NamedTuple):
    """Several changes in joint bases: ``D_i = left @ cores[i] @ right.T`` with orthonormal ``left`` ``[m,
    K]`` and ``right`` ``[n, L]``.

    ``cores`` is ``[T, K, L]``, float64, without the weights. A linear operation on the cores is the same
    operation on the changes, and ``core.change(merged)`` returns the result exactly as factors of rank
    ``min(K, L)``. Source: Core Space, arXiv 2509.17786, section 3.
    """

    left: np.ndarray
    right: np.ndarray
    cores: np.ndarray

    def change(self, merged: np.ndarray) -> Factors:
        """Returns a core ``[K, L]`` as a change ``[m, n]``, in the dtype of the bases."""
        narrow = merged.shape[0] <= merged.shape[1]
        dtype = self.left.dtype
        if narrow:
            return Factors((merged @ self.right.T).astype(dtype), self.left)
        return Factors(self.right.T, (self.left @ merged).astype(dtype))


def core(terms: Terms) -> JointCore:
    """Expresses the changes of ``terms`` in bases of all their columns and all their rows.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> terms = [Term(rng.standard_normal((r, 7)), rng.standard_normal((9, r)), 1.0) for r in (1, 2)]
        >>> space = core(terms)
        >>> space.cores.shape, np.allclose(space.change(space.cores[1]).dense(), terms[1].change.dense())
        ((2, 3, 3), True)
    """
    A, B = _join_factors(terms)
    left, left_core = np.linalg.qr(B)
    right, right_core = np.linalg.qr(A.T)
    ends = np.cumsum([len(term.A) for term in terms])[:-1]
    parts = zip(np.split(left_core, ends, axis=1), np.split(right_core, ends, axis=1), strict=True)
    dtype = np.result_type(*(term.B.dtype for term in terms))
    return JointCore(left.astype(dtype), right.astype(dtype), np.array([B @ A.T for B, A in parts]))


class Angles(NamedTuple):
    """The cosines of the principal angles between two changes, largest first: between their column spaces
    (``left``, outputs) and their row spaces (``right``, inputs).

    1 is a direction that both have, 0 a direction that they do not share. Source: Björck and Golub 1973.
    """

    left: np.ndarray
    right: np.ndarray


def angles(first: Factors, second: Factors) -> Angles:
    """Returns the principal angles between the column spaces and between the row spaces of two changes.

    Example:
        >>> line, plane = Factors(np.eye(3)[:1], np.eye(4)[:, :1]), Factors(np.eye(3)[:2], np.eye(4)[:, 2:])
        >>> principal = angles(line, plane)
        >>> principal.left, principal.right
        (array([0.]), array([1.]))
    """
    bases = [(_basis(change.B), _basis(change.A.T)) for change in (first, second)]
    cosines = [np.linalg.svd(P.T @ Q, compute_uv=False) for P, Q in zip(*bases, strict=True)]
    return Angles(*(np.minimum(values, 1.0) for values in cosines))


def _basis(columns: np.ndarray) -> np.ndarray:
    """Returns an orthonormal basis of the span of the columns, float64; the numerical rank is relative to the
    dtype of the argument.
    """
    u, values, _ = np.linalg.svd(_wide(columns), full_matrices=False)
    least = np.finfo(columns.dtype).eps * max(columns.shape) * (values[0] if len(values) else 0)
    return u[:, values > least]


def blocks(change: Factors, elements: int = 1 << 18) -> RowBlocks:
    """Yields the dense change in blocks of rows of about ``elements`` numbers: (rows, ``D[rows]``)."""
    for block in row_blocks(*change.shape, elements):
        yield block, change.rows(block)


def _join_factors(terms: Terms) -> Factors:
    """Returns the factors of all terms side by side, without their weights, in float64."""
    A = np.concatenate([term.A for term in terms], axis=0)
    return Factors(_wide(A), _wide(np.concatenate([term.B for term in terms], axis=1)))


def _by_term(terms: Terms, products: np.ndarray) -> np.ndarray:
    """Sums ``[R, R]`` to ``[T, T]``: one number for each pair of terms, including terms of rank 0."""
    member = np.repeat(np.eye(len(terms)), [len(term.A) for term in terms], axis=1)
    added: np.ndarray = member @ products @ member.T
    return added


def _wide(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float64, copy=False)
