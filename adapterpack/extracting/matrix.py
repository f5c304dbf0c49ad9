"""Extracts the factors of one matrix's change, with their measured error, up to the rank where the spectrum
is only rounding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..lowrank import Cut, Factors, LeadingSpectrum, Loss, RowSource, largest
from ..lowrank.range_finder import residual

_EDGE = 1.15
"""Singular values up to this multiple of the largest one expected of noise count as noise: rounding does not
have quite the same size everywhere.
"""
_EXPLAINED = 1.5
"""The remainder counts as rounding if its energy is at most this multiple of the expected energy."""
_SINGLE = 1e-6
"""The threshold, relative to the largest singular value or to a sum of squares, below which a value is zero
to float32.
"""
_TRIES = 4
ENERGY = 0.99
"""The share of the energy to keep of a change of full rank."""


class Extracted(NamedTuple):
    """The stored factors of a change, and their error (measured entry by entry).

    ``detected`` is the rank after which only rounding remains, or None if there is none; ``noise`` is the
    expected energy of that rounding.
    """

    factors: Factors | None
    loss: Loss
    detected: int | None
    noise: float


def extract_matrix(
    D: RowSource,
    *,
    total: float,
    noise: float,
    rank: int,
    energy: float | None = None,
    unevenness: float = 1.0,
) -> Extracted:
    """Returns the factors of ``D``, with the rank above rounding if ``rank`` and ``energy`` allow it; None if
    all of it is rounding.

    ``noise`` and ``unevenness`` are those of :class:`~.difference.Difference`. Without an ``energy``, a
    change that does not end in rounding keeps :data:`ENERGY`.

    Example:
        >>> from adapterpack.lowrank.range_finder import InMemory
        >>> rng = np.random.default_rng(0)
        >>> low = (rng.standard_normal((90, 3)) @ rng.standard_normal((3, 80))).astype(np.float32)
        >>> extract_matrix(InMemory(low), total=float((low**2).sum()), noise=1e-6, rank=16).detected
        3
    """
    approximation, detected = _spectrum_above_noise(D, total, noise, Cut(rank=rank), unevenness)
    if detected == 0:
        return Extracted(None, Loss(total, total), 0, noise)
    if energy is None and detected is not None:
        kept = min(rank, detected)
    else:
        kept = min(Cut(rank, energy or ENERGY).kept(approximation.spectrum.S, total), detected or rank)
    factors = Factors(*(value.astype(np.float32) for value in approximation.spectrum.cut(kept)[0]))
    return Extracted(factors, residual(D, factors), detected, noise)


def _spectrum_above_noise(
    D: RowSource, total: float, noise: float, cut: Cut, unevenness: float
) -> tuple[LeadingSpectrum, int | None]:
    """Returns the spectrum down to the level of rounding, and the rank above it.

    A change that is small compared with the rounding contains less rounding than expected, so the search
    follows its spectrum further down.
    """
    allowed = min(noise, 0.9 * total)
    for _ in range(_TRIES):
        approximation = largest(D, cut, noise=allowed)
        detected = rank_above(approximation, D.shape, noise, unevenness)
        if detected is not None or approximation.whole or approximation.left_out > 1.5 * allowed:
            break
        allowed /= 4
    return approximation, detected


def rank_above(
    approximation: LeadingSpectrum, shape: tuple[int, int], noise: float, unevenness: float
) -> int | None:
    """Returns the smallest rank after which the remainder has the size and the flat spectrum of rounding;
    None if there is no such rank.

    Ranks above half of the narrower side are not considered: such a change is not low-rank.

    The remainder after ``j`` values has an energy of ``s^2 (m - j)(n - j)``; if it is noise, its largest
    singular value is near ``s (sqrt(m - j) + sqrt(n - j))`` (Marchenko and Pastur 1967). Rounding has ``ulp^2
    / 12`` an entry.
    """
    (m, n), S = shape, approximation.spectrum.S
    remaining = approximation.total - np.concatenate([[0.0], np.cumsum(S**2)])
    # the remainder is a small difference of large sums of float32 products
    uncertainty = 0.0 if approximation.whole else _SINGLE * approximation.total
    for j in range(1 + min(len(S) - (not approximation.whole), min(m, n) // 2)):
        size = max(0.0, float(remaining[j]))
        if size > _EXPLAINED * noise + uncertainty:
            continue
        spread = math.sqrt(size / max(1, (m - j) * (n - j))) * (math.sqrt(m - j) + math.sqrt(n - j))
        if j == len(S) or S[j] <= max(_EDGE * unevenness * spread, _SINGLE * S[0]):
            return int(j)
    return None
