"""Measures what several changes do to each other at one site, and over all sites, by sums that add up.

- cosine: ``<D_i, D_j> / (|D_i| |D_j|)``.
- retained: ``<sum_j w_j D_j, D_i> / |D_i|^2``, the part of pack i that the weighted sum keeps; below 0 the
  sum reverses it.
- overlap: the mean squared cosine of the principal angles between outputs, and between inputs (Björck and
  Golub 1973).
- interference: ``|(U^T U - I) S (V^T V - I)|_1`` of the stacked singular vectors (singular task interference,
  arXiv 2412.00081, section 3.2), relative to ``sum S``.
- cross: the norm of the cross terms that averaging factor by factor, ``(sum sqrt(w_i) B_i) (sum sqrt(w_i)
  A_i)``, adds to the weighted sum, relative to that sum. It depends on how the changes are written as
  factors, which is why such an average is wrong.
- truncation: ``sqrt(sum_{j>k} S_j^2 / sum S^2)`` of the weighted sum at rank k (Eckart and Young 1936).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np

from ..lowrank import Factors, Spectrum, Term, Terms, energy_of, gram, stack
from ..lowrank.factors import inner
from ..lowrank.spectra import spectra, spectrum
from ..merging.fold import LossSums
from .scan import Entries


@dataclass(frozen=True)
class Measures:
    """Sums over one site or several; adding two objects (``one + two``) gives the sums over both.

    ``gram`` ``[T, T]`` of the changes without weights; ``shared`` ``[2, T, T]`` the squared cosines of the
    principal angles of outputs and of inputs, ``angles`` ``[T, T]`` the number of angles; ``interference``
    and the ``nuclear`` norm that it is divided by; ``tails`` the squared norms that the weighted sum loses at
    each rank; ``cross`` the squared norm of the cross terms, None where the ranks differ; ``base`` the
    squared norm of the base weights, None where unknown; ``folds`` what rounding to a dtype does to the
    weighted sum.
    """

    weights: np.ndarray
    gram: np.ndarray
    shared: np.ndarray
    angles: np.ndarray
    interference: float
    nuclear: float
    tails: np.ndarray
    cross: float | None
    entries: Entries
    base: float | None = None
    folds: Mapping[str, LossSums] = dataclasses.field(default_factory=dict)

    def __add__(self, other: Measures) -> Measures:
        folds = {
            dtype: self.folds[dtype] + other.folds[dtype] for dtype in self.folds if dtype in other.folds
        }
        return Measures(
            self.weights,
            self.gram + other.gram,
            self.shared + other.shared,
            self.angles + other.angles,
            self.interference + other.interference,
            self.nuclear + other.nuclear,
            self.tails + other.tails,
            _both(self.cross, other.cross),
            self.entries + other.entries,
            _both(self.base, other.base),
            folds,
        )

    @property
    def norms(self) -> np.ndarray:
        """``[T]``: the Frobenius norms ``|D_i|``."""
        return np.sqrt(np.maximum(np.diag(self.gram), 0))

    @property
    def combined(self) -> float:
        """``|sum w_i D_i|``."""
        return math.sqrt(max(0.0, float(self.weights @ self.gram @ self.weights)))

    @property
    def cosine(self) -> np.ndarray:
        """``[T, T]``; NaN for a change that is zero."""
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine: np.ndarray = np.clip(self.gram / np.outer(self.norms, self.norms), -1, 1)
        return cosine

    @property
    def retained(self) -> np.ndarray:
        """``[T]``; NaN for a change that is zero."""
        with np.errstate(invalid="ignore", divide="ignore"):
            retained: np.ndarray = self.gram @ self.weights / np.diag(self.gram)
        return retained

    @property
    def overlap(self) -> np.ndarray:
        """``[2, T, T]``: outputs, inputs; NaN where there are no angles."""
        with np.errstate(invalid="ignore", divide="ignore"):
            overlap: np.ndarray = self.shared / self.angles
        return overlap

    @property
    def relative(self) -> np.ndarray:
        """``[T]``: ``|D_i| / |W|``; NaN without a base."""
        return self.norms / math.sqrt(self.base) if self.base else np.full(len(self.gram), math.nan)

    @property
    def relative_interference(self) -> float:
        """The interference divided by the nuclear norm: 0 for changes that share no outputs or no inputs."""
        return self.interference / self.nuclear if self.nuclear else 0.0

    @property
    def relative_cross(self) -> float:
        """The norm of the cross terms divided by that of the weighted sum; NaN if unknown."""
        return (
            math.sqrt(max(0.0, self.cross)) / self.combined
            if self.cross is not None and self.combined
            else math.nan
        )

    @property
    def truncation(self) -> list[float]:
        """The relative truncation error at each rank."""
        whole = self.combined**2
        return [min(1.0, math.sqrt(tail / whole)) if whole else 0.0 for tail in self.tails]


def measure(terms: Terms, entries: Entries, ranks: Sequence[int] = ()) -> tuple[Measures, list[Spectrum]]:
    """Computes the measures of one site that need only factors, and the spectrum of every change without its
    weight.
    """
    decompositions = spectra([term.change for term in terms])
    total = stack(terms)
    values = spectrum(total).S
    shared, angles = _angles(decompositions)
    interference, nuclear = _interference(decompositions)
    measures = Measures(
        np.array([term.weight for term in terms]),
        gram(terms),
        shared,
        angles,
        interference,
        nuclear,
        np.array([energy_of(values[rank:]) for rank in ranks]),
        _cross(terms, total),
        entries,
    )
    return measures, decompositions


def pool(parts: Sequence[Measures]) -> Measures:
    """Adds up the measures of several sites."""
    return reduce(add, parts)


def effective_rank(S: np.ndarray) -> float:
    """``exp(H(S / sum S))``, the entropy's rank: from 1 to the rank; 0 for a change that is zero. Source: Roy
    and Vetterli 2007.

    Example:
        >>> round(effective_rank(np.array([2.0, 2.0, 2.0])), 9)
        3.0
    """
    shares = S[S > 0] / np.sum(S) if len(S) else S
    return float(np.exp(-np.sum(shares * np.log(shares)))) if len(shares) else 0.0


def stable_rank(S: np.ndarray) -> float:
    """``|D|_F^2 / sigma_1^2``; 0 for a change that is zero. Source: Rudelson and Vershynin 2007.

    Example:
        >>> stable_rank(np.array([2.0, 1.0]))
        1.25
    """
    return energy_of(S / S[0]) if len(S) else 0.0


def _both(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second


def _angles(decompositions: Sequence[Spectrum]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sum of the squared cosines of the principal angles, which between two subspaces is ``|Q_i^T
    Q_j|_F^2``.
    """
    count = len(decompositions)
    shared = np.zeros((2, count, count))
    angles = np.zeros((count, count))
    sides = [
        [svd.U.astype(np.float64) for svd in decompositions],
        [svd.V.astype(np.float64) for svd in decompositions],
    ]
    for i in range(count):
        for j in range(i, count):
            angles[i, j] = angles[j, i] = min(len(decompositions[i].S), len(decompositions[j].S))
            for side, bases in enumerate(sides):
                shared[side, i, j] = shared[side, j, i] = min(
                    float(np.sum((bases[i].T @ bases[j]) ** 2)), angles[i, j]
                )
    return shared, angles


def _interference(decompositions: Sequence[Spectrum]) -> tuple[float, float]:
    S = np.concatenate([svd.S for svd in decompositions])
    ends = np.cumsum([len(svd.S) for svd in decompositions])
    overlaps = []
    for vectors in ([svd.U for svd in decompositions], [svd.V for svd in decompositions]):
        wide = np.concatenate(vectors, axis=1).astype(np.float64)
        products = wide.T @ wide
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            # a change's own vectors are orthonormal: the rest of this block is rounding
            products[start:end, start:end] = 0
        overlaps.append(products)
    return float(np.abs((overlaps[0] * S) @ overlaps[1]).sum()), float(S.sum())


def _cross(terms: Terms, total: Factors) -> float | None:
    """Returns the squared norm of the terms that averaging factor by factor adds; None if the ranks differ,
    so that the factors cannot be added.
    """
    present = [term for term in terms if len(term.A) and term.weight]
    if not present:
        return 0.0
    if len({len(term.A) for term in present}) > 1:
        return None
    roots = [math.sqrt(abs(term.weight)) for term in present]
    A = sum(
        math.copysign(root, term.weight) * term.A.astype(np.float64)
        for root, term in zip(roots, present, strict=True)
    )
    B = sum(root * term.B.astype(np.float64) for root, term in zip(roots, present, strict=True))
    difference = stack([Term(A, B, 1.0), Term(total.A, total.B, -1.0)])  # type: ignore[arg-type]
    return max(0.0, inner(difference, difference))
