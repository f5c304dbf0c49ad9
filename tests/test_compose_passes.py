"""Passes over dense entries, votes and order statistics, against their formulas; and a composition with and
without the compiled products.
"""

from __future__ import annotations

import numpy as np
import pytest
from rule_laws import deltas, made

import adapterpack
from adapterpack import LoRA
from adapterpack._native import lowrank
from adapterpack.adapter_methods import Site
from adapterpack.composing.rules.entrywise_rules import elect
from adapterpack.lowrank import quantiles
from adapterpack.lowrank.quantiles import level
from adapterpack.lowrank.range_finder import InMemory, largest
from adapterpack.lowrank.truncation import Cut

pytestmark = pytest.mark.fast
SHAPES = [(1, 1), (2, 15), (2, 16), (3, 17), (1, 64), (5, 333), (4, 0), (2, 1000)]


def voted(values: np.ndarray, weights: np.ndarray, least: np.ndarray, normalize: bool) -> np.ndarray:
    """TIES, entry by entry in float64."""
    merged = np.zeros(values.shape[1])
    for place in range(values.shape[1]):
        votes = [
            float(w) * float(x) if abs(x) >= floor else 0.0
            for w, x, floor in zip(weights, values[:, place], least, strict=True)
        ]
        if abs(sum(votes)) <= 1e-6 * sum(map(abs, votes)):
            continue
        mine = [t for t, vote in enumerate(votes) if vote * sum(votes) > 0]
        merged[place] = sum(votes[t] for t in mine) / (
            sum(abs(float(weights[t])) for t in mine) if normalize else 1
        )
    return merged


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_vote(shape: tuple[int, int], normalize: bool) -> None:
    """Weights of any sign and of equal sizes, equal magnitudes, even votes, thresholds that an entry reaches
    exactly.
    """
    rng = np.random.default_rng(shape[1])
    # many are equal, opposite, or just at the threshold
    halves = (np.round(2 * rng.standard_normal(shape)) / 2).astype(np.float32)
    for values in (rng.standard_normal(shape, np.float32), halves):
        for weights in (
            np.ones(shape[0]),
            rng.choice([-1.0, 1.0, 0.5, -0.5, 0.3], shape[0]),
            rng.standard_normal(shape[0]),
        ):
            least = rng.choice([0, 0.5, 1], shape[0]).astype(np.float32)
            np.testing.assert_allclose(
                elect(values, weights, normalize, least),
                voted(values, weights.astype(np.float32), least, normalize),
                rtol=2e-6,
                atol=1e-6,
            )


def test_numbers_that_are_none_elect_nothing() -> None:
    values = np.array([[np.nan, np.inf, np.inf, 1e38, -0.0], [1, 1, -np.inf, 3e38, 0.0]], np.float32)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(elect(values, np.ones(2), True)[[0, 2, 3, 4]], 0)


@pytest.mark.parametrize("way", ["near the sample's", "by bits"])
@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 1.0])
def test_level_is_the_exact_order_statistic(share: float, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over blocks of any sizes, of magnitudes with equal ones, zeros and the smallest floats among them; with
    samples that mislead.
    """
    if way == "by bits":
        monkeypatch.setattr(quantiles, "_MOST_KEPT", 0)
    rng = np.random.default_rng(3)
    values = rng.standard_normal((3, 1001)).astype(np.float32)
    values[1, :400], values[2, 100:300], values[2, 300:400] = 0, 0.5, -0.5
    values[0, :5] = np.float32(1e-44)
    wanted = np.sort(np.abs(values), axis=1)[:, ::-1][:, max(1, round(share * 1001)) - 1]
    for pieces in (
        [values[:, :7], values[:, 7:500], values[:, 500:]],
        [values.reshape(3, 7, 143)],
        [values.astype(np.float64)],
    ):
        for sample in (
            lambda: None,
            lambda: values[:, ::3],
            lambda: values[:, :3],
            lambda: 2 * values,
            lambda: 0 * values,
        ):
            np.testing.assert_array_equal(level(lambda pieces=pieces: iter(pieces), share, sample), wanted)  # type: ignore[misc]
    assert len(level(lambda: iter([]), share)) == 0


@pytest.mark.parametrize("rule", ["ties", "dare_ties", "breadcrumbs_ties", "magnitude_prune"])
def test_a_composition_with_and_without_them(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same changes to rounding: the products of the factors may be added up in another order."""
    packs = [made(seed, LoRA(r=8, alpha=8), sites=[Site("big", 131, 97)]) for seed in (1, 2, 3)]
    one = deltas(adapterpack.compose(packs, rule=rule, weights=[0.5, -0.25, 1], rank=97))
    monkeypatch.setattr(lowrank, "_kernel", None)
    two = deltas(adapterpack.compose(packs, rule=rule, weights=[0.5, -0.25, 1], rank=97))
    differ = np.abs(one["big"] - two["big"]) > 1e-5 * np.abs(two["big"]).max()
    assert differ.mean() < 1e-3  # an entry that is just at a threshold may be on either side of it


def test_directions_that_are_known_are_a_better_start() -> None:
    """For one step less the error is nearer to the least; too many, too few and useless ones do no harm."""
    rng = np.random.default_rng(0)
    A, B = (
        rng.standard_normal((32, 260)).astype(np.float32),
        rng.standard_normal((300, 32)).astype(np.float32),
    )
    D = (B * np.linspace(2, 1, 32, dtype=np.float32)) @ A + 3 * rng.standard_normal((300, 260), np.float32)
    least = float(np.sum(np.linalg.svd(D.astype(np.float64), compute_uv=False)[16:] ** 2))

    def excess(guess: np.ndarray | None) -> float:
        factors, loss = largest(InMemory(D, guess), Cut(rank=16)).cut(Cut(rank=16))
        left = float(np.sum((D.astype(np.float64) - factors.B.astype(np.float64) @ factors.A) ** 2))
        assert loss.tail == pytest.approx(left, rel=1e-6)
        return left / least - 1

    assert excess(A.T) < min(excess(None), 1e-5)
    for guess in (
        A[:5].T,
        np.repeat(A, 4, axis=0).T,
        np.zeros((260, 32), np.float32),
        rng.standard_normal((260, 32), np.float32),
    ):
        assert excess(guess) < 2e-2


def test_a_matrix_whose_rows_lie_in_few_columns() -> None:
    """Directions beyond its rank add nothing, and are not counted twice."""
    rng = np.random.default_rng(0)
    D = np.zeros((300, 260), np.float32)
    D[:, :30] = rng.standard_normal((300, 30))
    for guess in (None, np.eye(260, dtype=np.float32)[:, :40]):
        found = largest(InMemory(D, guess), Cut(rank=40))
        np.testing.assert_allclose(
            found.spectrum.S[:30], np.linalg.svd(D[:, :30], compute_uv=False), rtol=1e-5
        )
        assert found.left_out < 1e-6 * found.total
        assert np.abs(found.spectrum.V.T @ found.spectrum.V - np.eye(len(found.spectrum.S))).max() < 1e-5
