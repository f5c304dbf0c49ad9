"""Defines a measure, as a function of how often each row counts, and its interval by the bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from ..readable import number

_SEED = 0


class Measure(NamedTuple):
    """One measure of an adapter.

    Args:
        name: its name in results.
        value: how often each row counts ``[rows]`` -> the measure.
        more_is_better: whether a larger value is better.
        draws: how many draws its interval takes at most.
    """

    name: str
    value: Callable[[np.ndarray], float]
    more_is_better: bool = True
    draws: int = 1000


def of_sums(
    name: str, parts: Iterable[np.ndarray], value: Callable[..., float], more_is_better: bool = True
) -> Measure:
    """Returns a measure that is a function of sums over rows. Each of ``parts`` is ``[rows]`` or ``[rows,
    n]``, and the function gets their sums, numbers or ``[n]``.
    """
    return Measure(name, lambda weights: value(*(weights @ part for part in parts)), more_is_better)


def ratio(
    name: str, part: np.ndarray, whole: np.ndarray | None = None, more_is_better: bool = True
) -> Measure:
    """Returns the sum of one figure over the sum of another; by default the mean over rows.

    Example:
        >>> float(ratio("accuracy", np.array([1.0, 0.0])).value(np.array([3, 1])))
        0.75
    """
    whole = np.ones(len(part)) if whole is None else whole
    return of_sums(name, (part, whole), np.divide, more_is_better)


def of_rows(name: str, value: Callable[[np.ndarray], float], draws: int = 200) -> Measure:
    """Returns a measure that is no function of sums: ``value`` gets the indices of the rows that count, each
    as often as it does.
    """
    return Measure(name, lambda weights: value(np.repeat(np.arange(len(weights)), weights)), draws=draws)


def pearson(x: np.ndarray, y: np.ndarray) -> Measure:
    """Returns Pearson's correlation of two figures of the rows."""
    return of_rows("pearson", lambda rows: _correlation(x[rows], y[rows]))


def spearman(x: np.ndarray, y: np.ndarray) -> Measure:
    """Returns Spearman's correlation: Pearson's of the ranks, equal values sharing their mean rank."""
    return of_rows("spearman", lambda rows: _correlation(_ranks(x[rows]), _ranks(y[rows])))


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


class BootstrapEstimate(NamedTuple):
    """A measure on all rows, and its 95 % interval by the bootstrap; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


def estimate_of(drawn: np.ndarray) -> BootstrapEstimate:
    """Returns the estimate of values as :func:`draw` gives them: the quantiles of the draws (Efron 1979,
    https://doi.org/10.1214/aos/1176344552).

    Example:
        >>> estimate_of(np.array([0.5, 0.5, 0.5, np.nan]))
        BootstrapEstimate(value=0.5, low=0.5, high=0.5)
    """
    known = drawn[1:][np.isfinite(drawn[1:])]
    bounds = np.quantile(known, (0.025, 0.975)) if known.size else (np.nan, np.nan)
    return BootstrapEstimate(*map(number, map(float, (drawn[0], *bounds))))


def draw(measure: Measure, rows: int, draws: int) -> np.ndarray:
    """Returns a measure on all rows, and then on draws of as many rows with replacement. All measures of so
    many draws get the same ones, so that differences are those of the same rows.
    """
    random = np.random.default_rng(_SEED)
    even = np.full(rows, 1 / rows)
    weights = (random.multinomial(rows, even) for _ in range(min(draws, measure.draws)))
    with np.errstate(all="ignore"):  # 0 / 0 is a measure that a draw does not have
        return np.array([measure.value(np.ones(rows, np.int64)), *map(measure.value, weights)])
