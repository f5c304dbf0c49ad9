"""Rules such as SLERP and Model Stock (class G): they return ``sum c_i D_i``, with coefficients computed from
the inner products of the changes alone.

A change is a vector of the inner-product space of matrices. ``x_i = sgn(w_i) D_i`` with the share ``a_i =
|w_i|`` is what the rules of spherical geometry interpolate, so a negative weight is the opposite direction. A
vector ``sum c_i x_i`` is held as ``c``, and its products are ``c G c'``: nothing of the size of a weight is
formed, and the factors of the result are those of the terms.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from ...errors import Unsupported
from ...lowrank import Factors, FactorSum, Term, Terms, gram, stack, weighted_sum
from ...lowrank.factors import column_gram, row_gram
from .rule import (
    MEAN,
    RULES,
    SUM,
    Fraction,
    Function,
    Rule,
    Steps,
    Weights,
    rule,
    with_scope,
)

_ORTHOGONAL = 0.1
"""Model Stock warns below this share of the mean, where it removes nearly the full change."""
_FLAT = 0.9995
"""The cosine above which the rules interpolate in a straight line, since rounding hides the angle between the
directions.
"""


def _as_given(weights: Weights) -> Weights:
    return weights


def _times(weights: Weights, *, lam: float) -> list[float]:
    return [lam * weight for weight in weights]


def _shares(weights: Weights) -> list[float]:
    """Returns ``w_i / sum_i |w_i|``; the divisor is never near 0."""
    return [weight / sum(map(abs, weights)) for weight in weights]


rule(
    "cat",
    "the factors side by side: the weighted sum of the changes, as it stands, of rank sum r_i",
    formula="sum w_i D_i",
    paper="https://arxiv.org/abs/2212.04089",
    needs="G",
    reduce=False,
    laws=SUM,
    coefficients=_as_given,
)(weighted_sum)
rule(
    "linear",
    "the weighted sum of the changes, brought to the smallest rank that holds it",
    formula="sum w_i D_i",
    paper="https://arxiv.org/abs/2212.04089",
    needs="G",
    laws=SUM,
    coefficients=_as_given,
)(weighted_sum)
rule(
    "svd",
    "the best approximation of the weighted sum of a rank, or with a share of its energy, that you give",
    formula="svd_k(sum w_i D_i)",
    paper="https://doi.org/10.1007/BF02288367",
    needs="C",
    exact=False,
    cut=True,
    laws=SUM,
)(weighted_sum)


def reweighted(terms: Terms, c: Iterable[float]) -> FactorSum:
    """``sum_i c_i D_i``."""
    return weighted_sum([term._replace(weight=float(value)) for term, value in zip(terms, c, strict=True)])


def total(terms: Terms, *, lam: float = 1.0) -> FactorSum:
    """``lam sum_i w_i D_i``."""
    return reweighted(terms, [lam * term.weight for term in terms])


@rule(
    "task_arithmetic",
    "the sum of the changes at one scale; every pack counts 1 without weights",
    formula="lam sum w_i D_i",
    paper="https://arxiv.org/abs/2212.04089",
    needs="G",
    unit=True,
    neutral={"lam": 1.0},
    laws=SUM,
    coefficients=_times,
)
def task_arithmetic(terms: Terms, *, lam: float = 0.3) -> FactorSum:
    """Returns ``lam sum_i w_i D_i``, with the default ``lam`` that suits eight tasks."""
    return total(terms, lam=lam)


@rule(
    "negate",
    "the opposite of the changes: what they taught is taken away",
    formula="-lam sum w_i D_i",
    paper="https://arxiv.org/abs/2212.04089",
    needs="G",
    unit=True,
    neutral={"lam": -1.0},
    laws=SUM,
    coefficients=lambda weights, *, lam: _times(weights, lam=-lam),
)
def negate(terms: Terms, *, lam: float = 1.0) -> FactorSum:
    """``-lam sum_i w_i D_i``."""
    return total(terms, lam=-lam)


@rule(
    "average",
    "the mean of the changes (model soup), by weights whose size alone counts",
    formula="sum w_i D_i / sum |w_i|",
    paper="https://arxiv.org/abs/2203.05482",
    needs="G",
    laws=MEAN,
    coefficients=_shares,
)
def average(terms: Terms) -> FactorSum:
    """``sum_i w_i D_i / sum_i |w_i|``."""
    return reweighted(terms, _shares([term.weight for term in terms]))


def products(sites: Sequence[Terms], **_: Any) -> np.ndarray:
    """Returns ``[T, T]``: the inner products of the changes, summed over the sites."""
    return np.asarray(np.sum([gram(terms) for terms in sites], axis=0))


def coefficient_rule(name: str, summary: str, **fields: Any) -> Callable[[Function], Function]:
    """Registers a rule whose result is a weighted sum. The decorated ``coefficients(G, a, *, ...)`` returns
    the weights of those ``x_i`` that are not zero, whose inner products are ``G``.
    """

    def register(coefficients: Function) -> Function:
        def mix(G: np.ndarray, given: Weights, scope: str, **params: Any) -> np.ndarray:
            signs = np.sign(given)
            weights = np.abs(given)
            products = G[0]
            alive = np.diag(products) > 0
            c = np.zeros(len(signs))
            if alive.any():
                c[alive] = coefficients(
                    (products * np.outer(signs, signs))[np.ix_(alive, alive)], weights[alive], **params
                )
            return np.asarray((c * signs)[None])

        def combine(terms: Terms, products: np.ndarray, **params: Any) -> FactorSum:
            return reweighted(terms, mix(products[None], [term.weight for term in terms], **params)[0])

        combine.__signature__ = with_scope(coefficients, "tensor")  # type: ignore[attr-defined]
        made = Rule(name, summary, function=combine, survey=products, mix=mix, **{"needs": "G", **fields})
        RULES.register(made)
        return coefficients

    return register


@coefficient_rule(
    "slerp",
    "two changes along the arc between their directions",
    formula="(sin((1-t) th) x_1 + sin(t th) x_2) / sin th, t = |w_2| / (|w_1| + |w_2|)",
    paper="https://doi.org/10.1145/325334.325242",
    laws=MEAN,
)
def slerp(G: np.ndarray, a: np.ndarray, *, straight: Fraction = _FLAT) -> np.ndarray:
    """``(sin((1 - t) th) x_1 + sin(t th) x_2) / sin th`` with ``t = a_2 / (a_1 + a_2)``; a line where the
    cosine of the angle is above ``straight``.

    Raises:
        Unsupported: there are more than two changes.
    """
    if len(a) == 1:
        return np.ones(1)
    _require_two(len(a), "slerp")
    return np.asarray(_slerp(G[None], a, straight)[0])


def _slerp_lines(G: np.ndarray, weights: Weights, *, per: str = "row") -> np.ndarray:
    """Returns the coefficients ``[lines, T]`` of :func:`nuslerp`."""
    signs = np.sign(weights)
    a = np.abs(weights)
    _require_two(len(a), "nuslerp")
    return signs * (np.ones((len(G), 1)) if len(a) == 1 else _slerp(G * np.outer(signs, signs), a, _FLAT))


@rule(
    "nuslerp",
    "slerp of every row, or every column, for itself",
    formula="row_j: slerp(x_1[j], x_2[j], t)",
    paper="https://doi.org/10.1145/325334.325242",
    needs="S",
    laws=MEAN,
    mix=_slerp_lines,
)
def nuslerp(terms: Terms, *, per: Literal["row", "column"] = "row") -> Factors:
    """Applies :func:`slerp` to every row, or every column, of two changes separately."""
    G = (row_gram if per == "row" else column_gram)(terms)
    return scaled_lines(terms, _slerp_lines(G, [term.weight for term in terms]), per)


def scaled_lines(terms: Terms, c: np.ndarray, per: str) -> Factors:
    """``sum_i diag(c[:, i]) D_i`` of rows, or ``sum_i D_i diag(c[:, i])`` of columns: ``c`` is ``[lines,
    T]``.
    """
    if per == "row":
        made = [Term(term.A, (term.B * c[:, [i]]).astype(term.B.dtype), 1.0) for i, term in enumerate(terms)]
    else:
        made = [Term((term.A * c[:, i]).astype(term.A.dtype), term.B, 1.0) for i, term in enumerate(terms)]
    return stack(made)


@coefficient_rule(
    "multi_slerp",
    "many changes on one sphere: the mean direction, moved by the mean of the tangents there",
    formula="(sum a_i |x_i|) exp_mu(sum a_i (u_i - <u_i, mu> mu)), u_i = x_i / |x_i|",
    paper="https://doi.org/10.1145/502122.502124",
    laws=MEAN,
)
def multi_slerp(G: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Moves the mean direction of the unit vectors by the mean of their tangents there, and scales it to the
    length ``sum a_i |x_i| / sum a_i``.
    """
    lengths = np.sqrt(np.diag(G))
    shares = a / a.sum()
    C = G / np.outer(lengths, lengths)
    mean = _unit(C, shares)
    tangent = shares - float(shares @ C @ mean) * mean
    return float(shares @ lengths) * _exponential(C, mean, tangent) / lengths


@coefficient_rule(
    "karcher",
    "the direction whose squared angles to all changes sum to the least, at their mean length",
    formula="(sum a_i |x_i|) argmin_u sum a_i angle(u, u_i)^2",
    paper="https://doi.org/10.1002/cpa.3160300502",
    laws=MEAN,
)
def karcher(G: np.ndarray, a: np.ndarray, *, iterations: Steps = 50, tolerance: float = 1e-12) -> np.ndarray:
    """Returns the Karcher mean of the directions, ``u <- exp_u(sum a_i log_u(u_i))`` iterated to convergence,
    at the length ``sum a_i |x_i| / sum a_i``.
    """
    lengths = np.sqrt(np.diag(G))
    shares = a / a.sum()
    C = G / np.outer(lengths, lengths)
    u = _unit(C, shares)
    for _ in range(iterations):
        cosines = np.clip(C @ u, -1, 1)
        angles = np.arccos(cosines)
        stretch = shares / np.sinc(angles / np.pi).clip(1e-9)  # th / sin th
        tangent = stretch - float(stretch @ cosines) * u
        u = _exponential(C, u, tangent)
        if np.sqrt(max(0.0, float(tangent @ C @ tangent))) < tolerance:
            break
    return float(shares @ lengths) * u / lengths


def stock_ratio(G: np.ndarray, mean: str) -> np.ndarray:
    """``t = T cos th / (1 + (T - 1) cos th)`` for ``[..., T, T]``, ``th`` the mean angle of pairs; 0 where it
    is obtuse, 1 for T = 1. With ``mean`` ``cosine``, of the mean cosine, which may be negative.
    """
    T = G.shape[-1]
    if T == 1:
        return np.ones(G.shape[:-2])
    lengths = np.sqrt(np.diagonal(G, axis1=-2, axis2=-1))
    sizes = lengths[..., :, None] * lengths[..., None, :]
    cosines = np.divide(G, sizes, out=np.zeros_like(G), where=sizes > 0).clip(-1, 1)
    pairs = cosines[..., *np.triu_indices(T, 1)]
    cosine = pairs.mean(axis=-1) if mean == "cosine" else np.cos(np.arccos(pairs).mean(axis=-1)).clip(0, 1)
    below = 1 + (T - 1) * cosine
    ratio: np.ndarray = np.divide(T * cosine, below, out=np.zeros_like(cosine), where=np.abs(below) > 1e-6)
    return ratio


def _stock_lines(G: np.ndarray, weights: Weights, *, per: str = "tensor", mean: str = "angle") -> np.ndarray:
    """Returns the coefficients ``[lines, T]`` of :func:`model_stock`."""
    signs = np.sign(weights)
    a = np.abs(weights)
    t = stock_ratio(G * np.outer(signs, signs), mean)
    if abs(t).max() < _ORTHOGONAL:
        warnings.warn(
            "model_stock leaves almost nothing of changes that are nearly orthogonal, as those of "
            "independently trained adapters mostly are",
            stacklevel=2,
        )
    return np.asarray(t[:, None] * (signs * a / a.sum()))


@rule(
    "model_stock",
    "the mean, drawn to the base by the angle between the changes: near 0 where they are orthogonal",
    formula="t mean_i D_i, t = T cos th / (1 + (T - 1) cos th)",
    paper="https://arxiv.org/abs/2403.19522",
    needs="G",
    laws=MEAN,
    mix=_stock_lines,
)
def model_stock(
    terms: Terms, *, per: Literal["tensor", "row"] = "tensor", mean: Literal["angle", "cosine"] = "angle"
) -> Factors | FactorSum:
    """Returns ``t mean_i D_i`` with ``t`` from the angle between the changes, one ``t`` for the site or for
    every row.
    """
    G = row_gram(terms) if per == "row" else gram(terms)[None]
    c = _stock_lines(G, [term.weight for term in terms], mean=mean)
    return scaled_lines(terms, c, "row") if per == "row" else reweighted(terms, c[0])


def _require_two(count: int, rule: str) -> None:
    if count > 2:
        raise Unsupported(
            f"{rule} goes from one change to another",
            expected="two packs with weights other than 0",
            found=count,
            remedy="use multi_slerp or karcher",
        )


def _slerp(G: np.ndarray, a: np.ndarray, straight: float) -> np.ndarray:
    """Returns the coefficients ``[lines, 2]`` of ``G`` ``[lines, 2, 2]``; a line above ``straight``."""
    t = a[1] / a.sum()
    sizes = np.sqrt(G[:, 0, 0] * G[:, 1, 1])
    cosine = np.divide(G[:, 0, 1], sizes, out=np.ones(len(G)), where=sizes > 0).clip(-1, 1)
    angle = np.arccos(cosine)
    flat = np.abs(cosine) > straight
    sine = np.where(flat, 1, np.sin(angle))
    curved = np.stack([np.sin((1 - t) * angle) / sine, np.sin(t * angle) / sine], axis=-1)
    return np.where(flat[:, None], np.array([1 - t, t]), curved)


def _unit(C: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Scales ``c`` to length 1; returns 0 where the vectors cancel."""
    length = np.sqrt(max(0.0, float(c @ C @ c)))
    return c / length if length > 1e-7 else np.zeros_like(c)


def _exponential(C: np.ndarray, u: np.ndarray, tangent: np.ndarray) -> np.ndarray:
    """``cos |t| u + sin |t| t / |t|``."""
    length = float(np.sqrt(max(0.0, float(tangent @ C @ tangent))))
    moved: np.ndarray = np.cos(length) * u + np.sinc(length / np.pi) * tangent
    return moved if u.any() else np.zeros_like(u)
