"""One matrix: the rank of its change, told by where the spectrum ends in rounding, and its factors with their measured error."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..lowrank.range_finder import Found, Rows, largest, residual
from ..lowrank.space import Factors
from ..lowrank.spectra import Loss
from ..lowrank.truncation import Cut

_EDGE = 1.15
"""Singular values up to this multiple of the edge that noise of the measured size has are noise: rounding is not quite of one size."""
_EXPLAINED = 1.5
"""What is left is rounding if its energy is at most this multiple of what rounding is expected to have."""
_SINGLE = 1e-6
"""What float32 cannot tell from nothing, beside the largest singular value, or in a sum of squares."""
_TRIES = 4
ENERGY = 0.99
"""The share that is kept of a change that has no end."""


class Extracted(NamedTuple):
    """The factors of a change, as they are stored, and what they leave out of it (measured entry by entry).

    ``detected`` is the rank after which only rounding is left, or None where the change has no such end; ``noise`` the energy of that
    rounding as it is expected from the dtype.
    """

    factors: Factors | None
    loss: Loss
    detected: int | None
    noise: float


def extract_matrix(
    D: Rows, *, total: float, noise: float, rank: int, energy: float | None = None, unevenness: float = 1.0
) -> Extracted:
    """The factors of ``D``: of the rank that it has above its rounding, if ``rank`` and ``energy`` allow it; None if it is all rounding.

    ``noise`` and ``unevenness`` are those of :class:`~.difference.Difference`. Without an ``energy``, a change that does not end in
    rounding keeps :data:`ENERGY`.

    Example:
        >>> from adapterpack.lowrank.range_finder import Held
        >>> rng = np.random.default_rng(0)
        >>> low = (rng.standard_normal((90, 3)) @ rng.standard_normal((3, 80))).astype(np.float32)
        >>> extract_matrix(Held(low), total=float((low**2).sum()), noise=1e-6, rank=16).detected
        3
    """
    found, detected = _look(D, total, noise, Cut(rank=rank), unevenness)
    if detected == 0:
        return Extracted(None, Loss(total, total), 0, noise)
    if energy is None and detected is not None:
        kept = min(rank, detected)
    else:
        kept = min(Cut(rank, energy or ENERGY).kept(found.spectrum.S, total), detected or rank)
    factors = Factors(*(value.astype(np.float32) for value in found.spectrum.cut(kept)[0]))
    return Extracted(factors, residual(D, factors), detected, noise)


def _look(D: Rows, total: float, noise: float, cut: Cut, unevenness: float) -> tuple[Found, int | None]:
    """The spectrum down to where it is rounding, and the rank above that.

    A change that is small beside the rounding has less of it than is expected, so its spectrum is followed further down.
    """
    allowed = min(noise, 0.9 * total)
    for _ in range(_TRIES):
        found = largest(D, cut, noise=allowed)
        detected = rank_above(found, D.shape, noise, unevenness)
        if detected is not None or found.whole or found.left_out > 1.5 * allowed:
            break
        allowed /= 4
    return found, detected


def rank_above(found: Found, shape: tuple[int, int], noise: float, unevenness: float = 1.0) -> int | None:
    """The smallest rank after which what is left has the size and the flat spectrum of rounding; None where there is none.

    A rank beyond half of the narrower side is none: a change of such a rank is no low-rank one.

    What is left after ``j`` values has an energy of ``s^2 (m - j)(n - j)``; if it is noise, its largest singular value is near
    ``s (sqrt(m - j) + sqrt(n - j))`` (Marchenko and Pastur 1967). Rounding has ``ulp^2 / 12`` an entry.
    """
    (m, n), S = shape, found.spectrum.S
    left = found.total - np.concatenate([[0.0], np.cumsum(S**2)])
    unseen = 0.0 if found.whole else _SINGLE * found.total  # what is left is a difference of sums of float32 products
    for j in range(1 + min(len(S) - (not found.whole), min(m, n) // 2)):
        size = max(0.0, float(left[j]))
        if size > _EXPLAINED * noise + unseen:
            continue
        spread = math.sqrt(size / max(1, (m - j) * (n - j))) * (math.sqrt(m - j) + math.sqrt(n - j))
        if j == len(S) or S[j] <= max(_EDGE * unevenness * spread, _SINGLE * S[0]):
            return int(j)
    return None
