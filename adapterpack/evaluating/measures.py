"""Defines a measure, as a function of how often each row counts, and its interval by the bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ..readable import number

_AT_ONCE = 1 << 22
"""The most numbers of a block of weights."""
_SEED = 0


class Measure(NamedTuple):
    """One measure of an adapter.

    Args:
        name: its name in results.
        value: how often each row counts ``[draws, rows]`` -> the measure of each draw ``[draws]``.
        more_is_better: whether a larger value is better.
        draws: how many draws its interval takes at most.
    """

    name: str
    value: Callable[[np.ndarray], np.ndarray]
    more_is_better: bool = True
    draws: int = 1000


def of_sums(
    name: str, parts: Iterable[np.ndarray], value: Callable[..., np.ndarray], more_is_better: bool = True
) -> Measure:
    """Returns a measure that is a function of sums over rows. Each of ``parts`` is ``[rows]`` or ``[rows,
    n]``, and the function gets the sums of each draw, ``[draws]`` or ``[draws, n]``.
    """

    def of(weights: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):  # 0 / 0 is a measure that a draw does not have
            return value(*(weights @ part for part in parts))

    return Measure(name, of, more_is_better)


def ratio(
    name: str, part: np.ndarray, whole: np.ndarray | None = None, more_is_better: bool = True
) -> Measure:
    """Returns the sum of one figure over the sum of another; by default the mean over rows.

    Example:
        >>> ratio("accuracy", np.array([1.0, 0.0])).value(np.array([[1, 1], [2, 0]])).tolist()
        [0.5, 1.0]
    """
    whole = np.ones(len(part)) if whole is None else whole
    return of_sums(name, (part, whole), np.divide, more_is_better)


def of_rows(name: str, value: Callable[[np.ndarray], float], draws: int = 200) -> Measure:
    """Returns a measure that is no function of sums: ``value`` gets the indices of the rows that count, each
    as often as it does.
    """

    def of(weights: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.array([value(np.repeat(np.arange(len(row)), row)) for row in weights])

    return Measure(name, of, draws=draws)


def pearson(name: str, x: np.ndarray, y: np.ndarray) -> Measure:
    """Returns Pearson's correlation of two figures of the rows."""
    x, y = x - x.mean(), y - y.mean()  # sums of centred values keep their digits

    def value(*sums: np.ndarray) -> np.ndarray:
        n, x, y, xx, yy, xy = sums
        correlation: np.ndarray = (n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))
        return correlation

    return of_sums(name, (np.ones(len(x)), x, y, x * x, y * y, x * y), value)


def spearman(name: str, x: np.ndarray, y: np.ndarray) -> Measure:
    """Returns Spearman's correlation: Pearson's of the ranks, equal values sharing their mean rank."""

    def value(rows: np.ndarray) -> float:
        return float(pearson(name, *(_ranks(one[rows]) for one in (x, y))).value(np.ones((1, len(rows))))[0])

    return of_rows(name, value)


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks


class BootstrapEstimate(NamedTuple):
    """A measure on all rows, and its 95 % interval by the bootstrap; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


def estimate_of(drawn: np.ndarray) -> BootstrapEstimate:
    """Returns the figure of values as :func:`draw` gives them: the quantiles of the draws (Efron 1979,
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
    weights = _draws(rows, min(draws, measure.draws))
    return np.concatenate([measure.value(np.ones((1, rows), np.int64)), *map(measure.value, weights)])


def _draws(rows: int, draws: int) -> Iterator[np.ndarray]:
    random, size = np.random.default_rng(_SEED), max(1, _AT_ONCE // rows)
    for first in range(0, draws, size):
        yield random.multinomial(rows, np.full(rows, 1 / rows), min(size, draws - first))
