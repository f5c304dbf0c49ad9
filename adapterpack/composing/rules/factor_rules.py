"""Rules that combine the factors themselves (class F): LoRA-LEGO and RobustMerge in canonical units, and
PEFT's modes under PEFT's names.

A unit is one row of ``A`` with one column of ``B``. The units of an adapter are an accident of its training:
``B M^-1`` and ``M A`` are the same adapter. LoRA-LEGO and RobustMerge therefore work on canonical units here,
the singular triplets ``u_j sqrt(S_j)``, ``sqrt(S_j) v_j``. PEFT's elementwise modes keep the factors as
stored, to reproduce PEFT's numbers, and warn about it.
"""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np

from ...errors import Unsupported
from ...lowrank import Factors, Term, Terms, magnitudes, zero
from ...lowrank.quantiles import level
from ...lowrank.spectra import spectra
from .rule import THINNED, Count, Fraction, Laws, Share, rule

_ROUNDS = 100
"""The most rounds of k-means; it converges much earlier."""


def canonical(terms: Terms) -> list[Factors]:
    """Returns each change times its weight in balanced singular units, strongest first; ``B`` takes the sign
    of the weight.
    """
    decompositions = spectra([term.change for term in terms])
    halves = [
        np.sqrt(spectrum.S * abs(term.weight)) for spectrum, term in zip(decompositions, terms, strict=True)
    ]
    return [
        Factors(spectrum.V.T * half[:, None], spectrum.U * (half * np.sign(term.weight)))
        for spectrum, half, term in zip(decompositions, halves, terms, strict=True)
    ]


@rule(
    "lora_lego",
    "singular units of all adapters in clusters, each its centroid at the mean length",
    formula="sqrt(r / k) sum_c b_c a_c^T",
    paper="https://arxiv.org/abs/2409.16167",
    needs="F",
    unit=True,
)
def lego(terms: Terms, *, clusters: Count = 0) -> Factors:
    """Clusters the units of all adapters into ``clusters`` groups (by default as many as the largest rank),
    and replaces each group by its centroid at the mean length.

    k-means starts from the longest unit and then repeatedly adds the unit farthest from those already chosen,
    so the start is not random.
    """
    changes = canonical(terms)
    units = np.concatenate([np.concatenate([change.A, change.B.T], axis=1) for change in changes], axis=0)
    n = changes[0].shape[1]
    largest_rank = max(change.rank for change in changes)
    k = min(clusters or largest_rank, len(units))
    if not k:
        return zero(*changes[0].shape)
    lengths = np.linalg.norm(units, axis=1)
    member = _cluster(units, k)
    centroids = []
    for cluster in range(k):
        mean = units[member == cluster].mean(axis=0)
        size = np.linalg.norm(mean)
        centroids.append(
            mean * (lengths[member == cluster].mean() / size) if size > 1e-6 * lengths.max() else 0 * mean
        )
    scaled = np.array(centroids) * (largest_rank / k) ** 0.25  # sqrt(r / k) of the product
    return Factors(
        scaled[:, :n].astype(terms[0].A.dtype), np.ascontiguousarray(scaled[:, n:].T, terms[0].B.dtype)
    )


def _cluster(units: np.ndarray, k: int) -> np.ndarray:
    """Returns the cluster of every unit, by Lloyd's algorithm."""
    squares = np.sum(units**2, axis=1)
    chosen = [int(np.argmax(squares))]
    nearest = np.sum((units - units[chosen[0]]) ** 2, axis=1)
    while len(chosen) < k:
        chosen.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, np.sum((units - units[chosen[-1]]) ** 2, axis=1))
    centres = units[chosen]
    member = np.full(len(units), -1)
    for _ in range(_ROUNDS):
        now = np.argmin(squares[:, None] - 2 * units @ centres.T + np.sum(centres**2, axis=1), axis=1)
        for cluster in range(k):  # an empty cluster takes a unit from another
            if not (now == cluster).any():
                now[int(np.argmax(np.sum((units - centres[now]) ** 2, axis=1)))] = cluster
        if (now == member).all():
            break
        member = now
        centres = np.array([units[member == cluster].mean(axis=0) for cluster in range(k)])
    return member


@rule(
    "robust_merge",
    "singular units trimmed, and weighted up where that cost them most; has cross terms",
    formula="(c sum_t S_t B_t^ / sum S_t) (c sum_t A_t^)",
    paper="https://arxiv.org/abs/2502.17159",
    needs="F",
    unit=True,
    neutral={"density": 1.0, "coefficient": 1.0},
)
def robust_merge(
    terms: Terms, *, density: Share = 0.2, quantile: Fraction = 0.8, coefficient: float = 2.0
) -> Factors:
    """``A = c sum A_t^``, ``B = c sum_t S_t B_t^ / sum_t S_t``: trims the units, and weights up those that
    lost most of ``A``.

    ``S_t`` is ``sum |A| / sum |A^|`` of each unit, and at least the ``quantile`` of the adapter's units.
    """
    changes = canonical(terms)
    rank = max(change.rank for change in changes)
    A, B, S = (
        np.zeros((len(changes), *shape))
        for shape in ((rank, changes[0].shape[1]), (changes[0].shape[0], rank), (rank,))
    )
    for t, change in enumerate(changes):
        if not change.rank:
            continue
        kept = _trim(change.A, density)
        A[t, : change.rank], B[t, :, : change.rank] = kept, _trim(change.B, density)
        left = np.abs(kept).sum(axis=1)
        ratio = np.divide(np.abs(change.A).sum(axis=1), left, out=np.zeros(change.rank), where=left > 0)
        S[t, : change.rank] = np.maximum(ratio, np.quantile(ratio, quantile))
    total = S.sum(axis=0)
    shares = np.divide(S, total, out=np.zeros_like(S), where=total > 0)
    merged = Factors(coefficient * A.sum(axis=0), coefficient * np.sum(B * shares[:, None, :], axis=0))
    return Factors(merged.A.astype(terms[0].A.dtype), merged.B.astype(terms[0].B.dtype))


@rule(
    "peft_linear",
    "PEFT's linear, for the same numbers: not the sum of the changes",
    formula="(sum sqrt(w_i s_i) B_i) (sum sqrt(w_i s_i) A_i)",
    paper="https://arxiv.org/abs/2212.04089",
    needs="F",
    laws=Laws(gauge=False, mixed_ranks=False),
)
def peft_linear(terms: Terms) -> Factors:
    """``(sum sqrt(|w_i s_i|) B_i) (sum sgn(w_i s_i) sqrt(|w_i s_i|) A_i)``: PEFT's ``linear``, cross terms
    and all.

    Raises:
        Unsupported: the ranks differ.
    """
    return Factors(*(parts.sum(axis=0) for parts in _weigh(_of_one_rank(terms, "peft_linear"))))


@rule(
    "peft_ties",
    "PEFT's ties, for the same numbers: votes on the factors, weights after the vote",
    formula="ties(sqrt(w_i s_i) B_i) ties(sqrt(w_i s_i) A_i)",
    paper="https://arxiv.org/abs/2306.01708",
    needs="F",
    neutral=THINNED,
    laws=Laws(gauge=False, mixed_ranks=False),
)
def peft_ties(
    terms: Terms, *, density: Share = 0.2, majority: Literal["total", "frequency"] = "total"
) -> Factors:
    """PEFT's ``ties``: trims, elects and averages each of the two factors separately; the weights apply after
    the vote.

    Raises:
        Unsupported: the ranks differ.
    """
    present = _of_one_rank(terms, "peft_ties")
    merged = []
    for parts, stored in zip(_weigh(present), _stack_factors(present), strict=True):
        kept = [_trim(part, density, round_down=True) for part in stored]
        votes = np.sum(kept if majority == "total" else np.sign(kept), axis=0)
        agree = np.sign(kept) == np.where(votes >= 0, 1, -1)
        counted = np.sum(agree, axis=0)
        added = np.where(agree & (np.array(kept) != 0), parts, 0).sum(axis=0)
        merged.append((added / np.maximum(counted, 1)).astype(parts.dtype))
    return Factors(*merged)


def _stack_factors(terms: Terms) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``A`` and ``B`` as PEFT stores them, without the scale: ``[T, r, n]`` and ``[T, m, r]``."""
    return np.stack([term.A for term in terms]), np.stack(
        [term.B / term.B.dtype.type(term.branch_scale) for term in terms]
    )


def _of_one_rank(terms: Terms, name: str) -> list[Term]:
    """Returns the terms that change the site, and warns that combining the factors elementwise adds cross
    terms.
    """
    present = [term for term in terms if len(term.A)]
    if len({len(term.A) for term in present}) > 1:
        raise Unsupported(
            f"{name} adds the factors entry by entry, so their ranks must be equal",
            expected="one rank",
            found=", ".join(str(len(term.A)) for term in present),
            remedy="use linear or ties, which combine the changes",
        )
    warnings.warn(
        f"{name} combines the factors and not the changes: the result has cross terms, and depends on how "
        "each adapter is written",
        stacklevel=2,
    )
    return present


def _weigh(terms: Terms) -> tuple[np.ndarray, np.ndarray]:
    """Returns the stored factors times PEFT's square roots of weight and scale."""
    A, B = _stack_factors(terms)
    weights = np.array([term.weight * term.branch_scale for term in terms])
    roots = np.sqrt(np.abs(weights))[:, None, None]
    return (A * (roots * np.sign(weights)[:, None, None])).astype(A.dtype), (B * roots).astype(B.dtype)


def _trim(matrix: np.ndarray, density: float, round_down: bool = False) -> np.ndarray:
    """Keeps the ``density`` largest entries and sets all others to 0."""
    kept = int(density * matrix.size) if round_down else density * matrix.size
    if round_down and not kept:
        return np.zeros_like(matrix)
    least = level(lambda: iter([magnitudes(matrix)[None]]), min(1.0, kept / matrix.size))
    return np.where(magnitudes(matrix) >= least, matrix, 0)
