"""LoRAHub: searches for the weights of a sum by a score of the result, without gradients and without
rebuilding a model.

The published code adds ``w_i`` to A and to B, so that a weight enters squared, with cross terms. Here the sum
is that of the changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
from msgspec import Meta

from ...errors import NonFinite
from ...lowrank import FactorSum, Terms, weighted_sum
from .rule import SUM, NotNegative, Positive, Steps, rule

Score = Callable[[np.ndarray], float]
"""Scores the result of weights ``[T]``; higher is better."""


@rule(
    "lorahub",
    "the weighted sum under the weights that score best, searched for without gradients; needs a score, "
    "or weights",
    formula="sum w_i D_i, w = argmax score(w) - penalty mean |w_i|",
    paper="https://arxiv.org/abs/2307.13269",
    needs="G",
    unit=True,
    laws=SUM,
    search=True,
)
def lorahub(
    terms: Terms,
    *,
    evaluations: Steps = 40,
    bound: Positive = 1.5,
    penalty: NotNegative = 0.05,
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0,
) -> FactorSum:
    """Returns ``sum_i w_i D_i`` under the weights of the search; the parameters are those of
    :func:`search_weights`.
    """
    return weighted_sum(terms)


def search_weights(
    score: Score,
    count: int,
    *,
    evaluations: int = 40,
    bound: float = 1.5,
    penalty: float = 0.05,
    seed: int = 0,
) -> list[float]:
    """Returns the weights, each within ``bound`` of 0, with the best ``score(w) - penalty mean |w_i|`` among
    ``evaluations`` evaluations.

    The first evaluation uses equal weights of sum 1. Then CMA-ES runs: a normal distribution moves to the
    better half of its samples and adapts to their shape. Samples outside the bounds are clipped. Source:
    Hansen 2016, The CMA evolution strategy: a tutorial, arXiv 1604.00772, algorithm in appendix A.

    Raises:
        NonFinite: the score is not a number.

    Example:
        >>> found = search_weights(lambda w: -float(np.sum((w - [0.8, -0.3]) ** 2)), 2, evaluations=200,
        ...     penalty=0.0)
        >>> [round(value, 1) for value in found]
        [0.8, -0.3]
    """
    best = None

    def judged(weights: np.ndarray) -> float:
        nonlocal best
        value = float(score(weights)) - penalty * float(np.abs(weights).mean())
        if not math.isfinite(value):
            raise NonFinite(
                "the score is not a finite number",
                where=", ".join(f"{weight:g}" for weight in weights),
                found=value,
                remedy="let the scorer give a number for every pack",
            )
        if best is None or value > best[0]:
            best = value, weights
        return value

    mean = np.full(count, min(1 / count, bound))
    judged(mean)
    left = evaluations - 1
    search = _Distribution(mean, bound / 3, seed)
    while left > 0:
        drawn = search.drawn(min(left, 4 + int(3 * math.log(count))), bound)
        search.moved(drawn, [judged(weights) for weights in drawn])
        left -= len(drawn)
    assert best is not None
    return [float(weight) for weight in best[1]]


class _Distribution:
    """CMA-ES: mean, step and covariance ``C``, with the evolution paths, which record the recent moves of the
    mean.
    """

    def __init__(self, mean: np.ndarray, step: float, seed: int) -> None:
        n = len(mean)
        self.mean = mean
        self.step = step
        self.C = np.eye(n)
        self.rng = np.random.default_rng(seed)
        self.path, self.turned = np.zeros(n), np.zeros(n)
        self.length = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))

    def drawn(self, count: int, bound: float) -> np.ndarray:
        """Draws ``count`` points, clipped to the bounds."""
        values, axes = np.linalg.eigh(self.C)
        normal = self.rng.standard_normal((count, len(self.mean)))
        points: np.ndarray = np.clip(
            self.mean + self.step * (normal * np.sqrt(values.clip(1e-20))) @ axes.T, -bound, bound
        )
        return points

    def moved(self, points: np.ndarray, values: Sequence[float]) -> None:
        """Updates mean, paths, covariance and step from the values at the points."""
        n = len(self.mean)
        half = max(1, len(points) // 2)
        shares = math.log(half + 0.5) - np.log(np.arange(1, half + 1))
        shares /= shares.sum()
        size = 1 / np.sum(shares**2)
        cs = (size + 2) / (n + size + 5)
        cc = (4 + size / n) / (n + 4 + 2 * size / n)
        c1 = 2 / ((n + 1.3) ** 2 + size)
        cm = min(1 - c1, 2 * (size - 2 + 1 / size) / ((n + 2) ** 2 + size))
        ways = (points[np.argsort(np.negative(values), kind="stable")[:half]] - self.mean) / self.step
        way = shares @ ways
        spread, axes = np.linalg.eigh(self.C)
        whitened = axes @ ((axes.T @ way) / np.sqrt(spread.clip(1e-20)))
        self.path = (1 - cs) * self.path + math.sqrt(cs * (2 - cs) * size) * whitened
        self.turned = (1 - cc) * self.turned + math.sqrt(cc * (2 - cc) * size) * way
        self.C = (
            (1 - c1 - cm) * self.C + c1 * np.outer(self.turned, self.turned) + cm * (ways.T * shares) @ ways
        )
        self.mean = self.mean + self.step * way
        damping = 1 + cs + 2 * max(0.0, math.sqrt((size - 1) / (n + 1)) - 1)
        self.step *= math.exp(min(1.0, cs / damping * (np.linalg.norm(self.path) / self.length - 1)))
