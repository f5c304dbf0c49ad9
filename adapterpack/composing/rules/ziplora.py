"""ZipLoRA: scales every column of every adapter so that they interfere as little as possible."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...lowrank import Factors, Terms, zero
from .gram_rules import scaled_lines
from .rule import NotNegative, Positive, Steps, rule

_FIRST = 0.9
_SECOND = 0.999
_SMALL = 1e-8
"""Adam's decays and its epsilon, as published."""


class Overlaps(NamedTuple):
    """The inner products of the factors: ``P[j][i] = B_j^T B_i``, and ``E[i] = D_i D_i^T`` in ``B_i``'s
    coordinates ``B_i E B_i^T``.
    """

    A: list[np.ndarray]
    P: list[list[np.ndarray]]
    sizes: np.ndarray


@rule(
    "ziplora",
    "every column of every change times a number, so that each keeps its outputs and few columns are shared",
    formula=(
        "sum_i x_i diag(m_i), m = argmin sum_i |(X - x_i) x_i^T|^2 / |x_i x_i^T|^2 + lam mean_k |m_i[k] "
        "m_j[k]|"
    ),
    paper="https://arxiv.org/abs/2311.13600",
    needs="S",
    unit=True,
)
def ziplora(terms: Terms, *, lam: NotNegative = 0.01, steps: Steps = 100, rate: Positive = 0.01) -> Factors:
    """``sum_i D_i diag(m_i)`` with the ``m_i`` that minimise ZipLoRA's loss, from ``m_i = 1`` by Adam.

        sum_i |(X - x_i) x_i^T|^2 / |x_i x_i^T|^2  +  lam mean_k sum_{i<j} |m_i[k] m_j[k]|,
        X = sum_i x_i diag(m_i),   x_i = w_i D_i

    The published loss keeps each adapter's outputs on images of its own; this version assumes, like WUDI,
    that the inputs are distributed like the adapter's own rows ``x_i``, so it needs no images and no model.
    It works on the factors alone, ``O(T^2 r^2 n)`` a step. The sizes are relative, so ``lam`` means the same
    whatever the adapters' scale. Source: Shah et al. 2023, arXiv 2311.13600, equations 3 and 4.
    """
    present = [term for term in terms if len(term.A)]
    scaled = [(term.A.astype(np.float64), term.weight * term.B.astype(np.float64)) for term in present]
    P = [[left.T @ right for _, right in scaled] for _, left in scaled]
    sizes = np.array([np.sum((K := A @ A.T) @ P[i][i] @ K * P[i][i].T) for i, (A, _) in enumerate(scaled)])
    if not (sizes > 0).all():
        kept = [term for term, size in zip(present, sizes, strict=True) if size > 0]
        return ziplora(kept, lam=lam, steps=steps, rate=rate) if kept else zero(*terms[0].change.shape)
    m = _descend(Overlaps([A for A, _ in scaled], P, sizes), lam, steps, rate)
    return scaled_lines(present, (m * np.array([term.weight for term in present])[:, None]).T, "column")


def _descend(over: Overlaps, lam: float, steps: int, rate: float) -> np.ndarray:
    """Returns ``[T, n]``: one multiplier for each column of each adapter."""
    m: np.ndarray = np.ones((len(over.A), over.A[0].shape[1]))
    first, second = np.zeros_like(m), np.zeros_like(m)
    for step in range(1, steps + 1):
        slope = _slope(over, m, lam)
        first = _FIRST * first + (1 - _FIRST) * slope
        second = _SECOND * second + (1 - _SECOND) * slope**2
        m = m - rate * (first / (1 - _FIRST**step)) / (
            np.sqrt(second / (1 - _SECOND**step)) + _SMALL / m.size
        )
    return m


def _slope(over: Overlaps, m: np.ndarray, lam: float) -> np.ndarray:
    """Returns the gradient of the loss by ``m``: with ``R_i = (X - x_i) x_i^T = sum_j B_j C_ji B_i^T``,
    ``C_ji = A_j diag(m_j) A_i^T``, the gradient of ``|R_i|^2`` by ``m_j`` is twice the diagonal of ``A_j^T
    B_j^T R_i B_i A_i``.
    """
    T = len(m)
    slope = np.zeros_like(m)
    for i in range(T):
        # exactly 0 for a lone pack, whose rounding Adam would follow
        C = [(over.A[j] * (m[j] - (i == j))) @ over.A[i].T for j in range(T)]
        for j in range(T):
            inner = sum(over.P[j][k] @ C[k] for k in range(T)) @ over.P[i][i]
            slope[j] += 2 / over.sizes[i] * np.einsum("rk,rk->k", over.A[j], inner @ over.A[i])
    sizes = np.abs(m)
    signs = np.sign(m)
    return np.asarray(slope + lam / m.shape[1] * signs * (sizes.sum(axis=0) - sizes))
