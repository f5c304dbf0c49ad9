"""Decides where to cut a spectrum: at a rank, a share of the energy, one of kohya's three criteria, or by one
parameter budget for all sites.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral

import numpy as np

from ..errors import ConfigError

_SHARES = {
    "energy": "the squared singular values",
    "sv_cumulative": "the sum of the singular values",
    "sv_fro": "the Frobenius norm",
}


@dataclass(frozen=True)
class Cut:
    """How much of a change to keep. ``rank`` limits the result in any case; at most one of the other criteria
    may be set.

    With ``S`` the singular values, largest first: ``energy`` q keeps the fewest with ``sum S_j^2 >= q sum
    S^2``; ``sv_ratio`` p those with ``S_j > S_1 / p``; ``sv_cumulative`` p the fewest with ``sum S_j >= p sum
    S``; ``sv_fro`` p the fewest with ``sum S_j^2 >= p^2 sum S^2``. The last three are the criteria of kohya's
    ``resize_lora.py``, here applied to the complete spectrum.

    Raises:
        ConfigError: a value out of its range, or two criteria at once.

    Example:
        >>> Cut(energy=0.9).kept(np.array([3.0, 1.0, 0.5])), Cut(sv_ratio=4).kept(np.array([3.0, 1.0,
        ...     0.5])), Cut().kept(np.zeros(0))
        (2, 2, 0)
    """

    rank: int | None = None
    energy: float | None = None
    sv_ratio: float | None = None
    sv_cumulative: float | None = None
    sv_fro: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            require_count(self.rank, "rank")
        if len(self.criteria) > 1:
            raise ConfigError(
                f"{' and '.join(self.criteria)} all say where to cut",
                expected="one of them",
                found=", ".join(f"{name}={value}" for name, value in self.criteria.items()),
                remedy="give one of them",
            )
        for name, of in _SHARES.items():
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(
                    f"{name} is a share of {of}",
                    where=name,
                    expected="above 0, at most 1",
                    found=value,
                    remedy="give a share such as 0.99",
                )
        if self.sv_ratio is not None and not (math.isfinite(self.sv_ratio) and self.sv_ratio >= 1):
            raise ConfigError(
                "sv_ratio says how much smaller than the largest a singular value may be",
                where="sv_ratio",
                expected="a finite number of at least 1",
                found=self.sv_ratio,
                remedy="give a number such as 20",
            )

    @property
    def criteria(self) -> dict[str, float]:
        """The criteria that are set, without the rank."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "rank"}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def settings(self) -> dict[str, float]:
        """All settings that are not None, including the rank."""
        return {**({} if self.rank is None else {"rank": self.rank}), **self.criteria}

    def kept(self, S: np.ndarray, total: float | None = None) -> int:
        """Returns how many of the singular values ``S`` to keep; at least 1 if there are any. ``total`` is
        ``sum S^2`` if ``S`` is incomplete.
        """
        kept = len(S)
        if not self.criteria:
            return kept if self.rank is None else min(kept, self.rank)
        squares = np.cumsum(S**2)
        whole = (float(squares[-1]) if kept else 0.0) if total is None else total
        if self.energy is not None:
            kept = _fewest(squares, self.energy * whole)
        if self.sv_fro is not None:
            kept = _fewest(squares, self.sv_fro**2 * whole)
        if self.sv_cumulative is not None:
            sums = np.cumsum(S)
            kept = _fewest(sums, self.sv_cumulative * float(sums[-1]) if len(S) else 0.0)
        if self.sv_ratio is not None and len(S):
            kept = int(np.count_nonzero(S * self.sv_ratio > S[0])) or 1
        return min(kept, len(S)) if self.rank is None else min(kept, len(S), self.rank)


def require_count(value: object, where: str) -> None:
    """Checks that ``value`` is an integer of at least 1; 2.0 is not accepted.

    Raises:
        ConfigError: ``value`` is something else.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            "this must be a positive whole number",
            where=where,
            expected="at least 1",
            found=value,
            remedy="give a number such as 8",
        )


def _fewest(sums: np.ndarray, wanted: float) -> int:
    """Returns how many terms are needed for their sum to reach ``wanted``, or all of them if it never
    does.
    """
    return min(len(sums), int(np.searchsorted(sums, wanted)) + 1)


def energy_of(S: np.ndarray) -> float:
    """Returns ``sum S^2``, summed from the smallest for accuracy."""
    return float(np.sum(S[::-1] ** 2))


def shared_out(
    spectra: Sequence[np.ndarray], costs: Sequence[int], budget: int, cap: int | None = None
) -> list[int]:
    """Returns the rank at each site that minimises the total squared error with ``sum rank * cost`` at most
    ``budget``.

    ``spectra`` are the singular values of each site, largest first, and ``costs`` the numbers that one more
    rank takes there, ``m + n``. The function takes values in descending order of what they save for their
    cost, ``S_j^2 / (m + n)``; a value that no longer fits is skipped for cheaper ones. The result has the
    least error for the numbers that it uses, and differs from the optimum for the budget by at most one
    value.

    Example:
        >>> shared_out([np.array([3.0, 2.0]), np.array([2.5, 0.1])], [10, 10], 30)
        [2, 1]
    """
    kept = [0] * len(spectra)
    left = budget
    heap = [
        (-(float(S[0]) ** 2) / cost, site)
        for site, (S, cost) in enumerate(zip(spectra, costs, strict=True))
        if len(S)
    ]
    # Greedy selection is optimal for the numbers used, because each site's values are taken in descending
    # order.
    heapq.heapify(heap)
    while heap:
        _, site = heapq.heappop(heap)
        if costs[site] > left:
            continue  # every further rank of this site costs the same, so none fits
        left -= costs[site]
        kept[site] += 1
        S = spectra[site]
        if kept[site] < min(len(S), len(S) if cap is None else cap):
            heapq.heappush(heap, (-(float(S[kept[site]]) ** 2) / costs[site], site))
    return kept
