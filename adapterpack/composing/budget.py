"""Checks a budget of parameters and distributes it over all sites as ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import ConfigError, NothingToDo
from ..lowrank import Cut
from ..lowrank.truncation import shared_out

FULL_RANK = 256
"""The largest rank that a change without a low rank can get under a budget."""


def check_budget(budget: float | None, cut: Cut) -> None:
    """Refuses a budget that cannot be kept.

    Raises:
        ConfigError: the budget is out of range, or the call also sets another criterion, such as a rank.
    """
    if budget is not None and cut.criteria:
        raise ConfigError(
            f"budget and {next(iter(cut.criteria))} both say where to cut",
            where="budget",
            expected="one of them",
            remedy="give one of them",
        )
    if budget is not None and not (np.isfinite(budget) and budget > 0):
        raise ConfigError(
            "a budget is a number of parameters, or below 1 a share of those that there are",
            where="budget",
            expected="above 0",
            found=budget,
            remedy="give a number such as 500000, or 0.5",
        )


def parameters(budget: float, present: int) -> int:
    """Returns the number of parameters that a budget allows; a budget below 1 is a share of ``present``."""
    return int(budget * present) if budget < 1 else int(budget)


def ranks_within(
    limit: int, spectra: Sequence[np.ndarray], costs: Sequence[int], cap: int | None
) -> list[int]:
    """Returns the rank of every site that gives the least total error within the budget
    (:func:`~adapterpack.lowrank.truncation.shared_out`).

    Raises:
        NothingToDo: the budget has no room for rank 1 at any site.
    """
    ranks = shared_out(spectra, costs, limit, cap)
    if any(map(len, spectra)) and not any(ranks):
        raise NothingToDo(
            "the budget does not hold one rank at one site",
            where="budget",
            expected=f"at least {min(costs)} numbers",
            found=limit,
            remedy="give a larger budget",
        )
    return ranks
