"""Spectral rules such as TSV-M, Iso-C and WUDI (class C), which work in the joint bases of the changes, so
that the result has low rank.

The rules leave out all directions without a singular value. Dense code gives weight to the null space of a
sum of low-rank changes, and so amplifies rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from ...lowrank import Factors, JointCore, Terms, zero
from ...lowrank.factors import core
from .rule import MEAN, Laws, Positive, Share, rule

Mean = Literal["support", "site"]
"""What Iso-C takes the mean of singular values over."""
_NULL = 1e-5
"""The share of the largest singular value below which singular values of float32 changes are only rounding.
"""


class SpectralParts(NamedTuple):
    """``U diag(S) V^T`` of a core: ``U`` ``[K, k]``, ``S`` ``[k]`` falling, ``V`` ``[L, k]``."""

    U: np.ndarray
    S: np.ndarray
    V: np.ndarray

    def first(self, k: int) -> SpectralParts:
        """Returns the ``k`` largest."""
        return SpectralParts(self.U[:, :k], self.S[:k], self.V[:, :k])

    @property
    def matrix(self) -> np.ndarray:
        """``U diag(S) V^T``."""
        product: np.ndarray = (self.U * self.S) @ self.V.T
        return product


def decompose(matrix: np.ndarray, least: float = 0.0) -> SpectralParts:
    """Returns the singular values above rounding and above ``least``, with their vectors; float64."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    kept = int(np.count_nonzero(s > max(least, _NULL * s[0]))) if len(s) and s[0] > 0 else 0
    return SpectralParts(u[:, :kept], s[:kept], vt[:kept].T)


def join_parts(parts: Sequence[SpectralParts]) -> SpectralParts:
    """Puts directions and values side by side."""
    return SpectralParts(*(np.concatenate(field, axis=-1) for field in zip(*parts, strict=True)))


def polar(X: np.ndarray) -> np.ndarray:
    """``X (X^T X)^{-1/2}`` on the support of ``X``: the nearest matrix with orthonormal columns, where the
    columns are independent.
    """
    u, s, vt = np.linalg.svd(X, full_matrices=False)
    kept = s > _NULL * s[0] if len(s) else np.zeros(0, bool)
    nearest: np.ndarray = u[:, kept] @ vt[kept]
    return nearest


@rule(
    "tsv_m",
    "singular triplets of all changes side by side, made orthogonal; the same in the core space",
    formula="lam polar([U_1 .. U_T]) diag(S_1 .. S_T) polar([V_1 .. V_T])^T",
    paper="https://arxiv.org/abs/2412.00081",
    needs="C",
    unit=True,
)
def tsv_m(terms: Terms, *, lam: float = 1.0, share_kept: Share = 1.0) -> Factors:
    """``lam U^ S V^T^``: puts the singular triplets of all changes side by side, and replaces ``U`` and ``V``
    by their orthogonal polar factors.
    """
    space, changes = _weigh(terms)
    kept = [
        triplets.first(max(1, round(share_kept * len(triplets.S)))) for triplets in map(decompose, changes)
    ]
    triplets = join_parts(kept)
    if not len(triplets.S):
        return _zero(terms)
    return space.change(lam * SpectralParts(polar(triplets.U), triplets.S, polar(triplets.V)).matrix)


@rule(
    "iso_c",
    "the sum with all its singular values made equal, on its support alone",
    formula="alpha mean(S) U V^T, U S V^T = sum w_i D_i",
    paper="https://arxiv.org/abs/2502.04959",
    needs="C",
    unit=True,
    laws=Laws(identity=False),
)
def iso_c(terms: Terms, *, alpha: float = 1.0, mean: Mean = "support") -> Factors:
    """``alpha mean(S) U V^T`` of the weighted sum, on its support: R directions. ``mean="site"`` takes the
    mean over all ``min(m, n)``.
    """
    space, changes = _weigh(terms)
    total = decompose(changes.sum(axis=0), _least(changes))
    if not len(total.S):
        return _zero(terms)
    return space.change(alpha * _flat(total, total.S, terms, mean).matrix)


@rule(
    "iso_cts",
    "Iso-C of the common directions and of the first own directions of each change, on their support alone",
    formula="alpha mean(S*) polar(U*) polar(V*)^T, U* = [U_k, U_1 .. U_T]",
    paper="https://arxiv.org/abs/2502.04959",
    needs="C",
    unit=True,
    laws=Laws(identity=False),
)
def iso_cts(terms: Terms, *, alpha: float = 1.0, common: Share = 0.8, mean: Mean = "support") -> Factors:
    """Applies Iso-C to the ``common`` share of the sum's directions together with the leading remaining
    directions of each change.
    """
    space, changes = _weigh(terms)
    total = decompose(changes.sum(axis=0), _least(changes))
    if not len(total.S):
        return _zero(terms)
    k = max(1, round(common * len(total.S)))
    shared = total.first(k)
    further = (len(total.S) - k) // len(terms)
    rest = [
        decompose(change - shared.U @ (shared.U.T @ change), _least(changes)).first(further)
        for change in changes
    ]
    directions = join_parts([shared, *rest])
    return space.change(
        alpha
        * _flat(
            SpectralParts(polar(directions.U), directions.S, polar(directions.V)), directions.S, terms, mean
        ).matrix
    )


@rule(
    "cart",
    "the mean, and of each change's way from it the first directions",
    formula="M + lam sum_t svd_k(x_t - M), M = sum w_t D_t / sum |w_t|",
    paper="https://arxiv.org/abs/2412.12153",
    needs="C",
    laws=MEAN,
)
def cart(terms: Terms, *, lam: float = 0.1, share_kept: Share = 0.04) -> Factors:
    """``M + lam sum_t svd_k(D_t - M)`` with the mean ``M``: keeps of each change's difference from the mean
    the rank ``share_kept`` of ``min(m, n)``.
    """
    space, changes = _weigh(terms)
    weights = np.array([term.weight for term in terms])
    mean = changes.sum(axis=0) / np.abs(weights).sum()
    k = max(1, round(share_kept * min(terms[0].change.shape)))
    ways = changes / np.abs(weights)[:, None, None] - mean
    least = _least(changes / np.abs(weights)[:, None, None])
    return space.change(mean + lam * np.sum([decompose(way, least).first(k).matrix for way in ways], axis=0))


@rule(
    "wudi",
    "the change whose difference from each adapter is least in that adapter's own row space, in closed form",
    formula="X (sum C_t + ridge I) = sum w_t D_t C_t + ridge sum w_t D_t, C_t = D_t^T D_t / |D_t|^2",
    paper="https://arxiv.org/abs/2503.08099",
    needs="S",
    unit=True,
)
def wudi(terms: Terms, *, ridge: Positive = 0.01) -> Factors:
    """``X (sum C_t + ridge I) = sum D_t C_t + ridge sum D_t`` with ``C_t = D_t^T D_t / |D_t|^2``, solved in
    the joint row space.

    The stationary point of WUDI's ``sum |(X - D_t) D_t^T|^2 / |D_t|^2`` under a ridge towards the sum, from
    which its descent begins.
    """
    space, changes = _weigh(terms)
    sizes = np.sum(changes**2, axis=(1, 2))
    C = np.array([change.T @ change / size for change, size in zip(changes, sizes, strict=True) if size > 0])
    if not len(C):
        return _zero(terms)
    right = np.sum(changes[sizes > 0] @ C, axis=0) + ridge * changes.sum(axis=0)
    left = C.sum(axis=0) + ridge * np.eye(C.shape[1])
    return space.change(np.linalg.solve(left, right.T).T)


def _weigh(terms: Terms) -> tuple[JointCore, np.ndarray]:
    """Returns the joint bases, and the cores times their weights."""
    space = core(terms)
    return space, space.cores * np.array([term.weight for term in terms])[:, None, None]


def _least(changes: np.ndarray) -> float:
    """Returns the singular value below which there is only rounding, for changes of this size."""
    return _NULL * float(np.linalg.norm(changes, axis=(1, 2)).max())


def _flat(parts: SpectralParts, S: np.ndarray, terms: Terms, mean: str) -> SpectralParts:
    """Replaces all singular values by one: the mean of ``S`` over the directions, or over all directions that
    the site has room for.
    """
    size = S.sum() / (len(S) if mean == "support" else min(terms[0].change.shape))
    return parts._replace(S=np.full(len(S), size))


def _zero(terms: Terms) -> Factors:
    return zero(*terms[0].change.shape)
