"""What each rule computes, against dense formulas in float64 that are written anew here; and the pieces that
the rules are made of.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from rule_laws import SITES, Deltas, Ours, close, deltas, made, measured

import adapterpack
from adapterpack import LoRA
from adapterpack.adapter_methods import Site
from adapterpack.composing import truncate as finish
from adapterpack.composing.rules import entries, trim
from adapterpack.composing.rules.rule import rules
from adapterpack.lowrank.seeded_random import uniform

pytestmark = pytest.mark.fast
PATHS = [site.path for site in SITES]
WEIGHTS = [0.7, -0.4, 1.1]


# Formulas. Each takes the dense changes [T, m, n] of one site, and those of all sites, in float64.


def three() -> tuple[list[Any], dict[str, np.ndarray]]:
    packs = [made(1, LoRA(r=2, alpha=7)), made(2), made(3, LoRA(r=4, alpha=4, use_rslora=True))]
    return packs, {path: np.array([deltas(pack)[path] for pack in packs]) for path in PATHS}


def found(rule: str, params: dict[str, Any], weights: Sequence[float] = WEIGHTS) -> Deltas:
    return deltas(Ours(rule).pack(three()[0][: len(weights)], weights, params))


def kept(D: np.ndarray, density: float, among: Sequence[np.ndarray]) -> np.ndarray:
    """``[T, ...]``: which entries are among the largest of each change; ``among`` are all sites' changes."""
    least = [
        np.sort(np.concatenate([np.abs(site[t]).ravel() for site in among]))[::-1] for t in range(len(D))
    ]
    return np.array([np.abs(D[t]) >= each[round(density * len(each)) - 1] for t, each in enumerate(least)])


def voted(D: np.ndarray, w: np.ndarray) -> np.ndarray:
    """TIES' election, entry by entry."""
    merged = np.zeros(D.shape[1:])
    for place in np.ndindex(*merged.shape):
        votes = w * D[(slice(None), *place)]
        mine = [t for t in range(len(w)) if votes[t] * votes.sum() > 0]
        if mine:
            merged[place] = sum(votes[t] for t in mine) / sum(abs(w[t]) for t in mine)
    return merged


@pytest.mark.parametrize("scope", ["adapter", "tensor"])
@pytest.mark.parametrize("density", [0.2, 0.61])
def test_ties_and_magnitude_prune(scope: str, density: float) -> None:
    """The largest entries of the whole adapter, or of each tensor; the vote on weighted entries; the mean, or
    sum, of those who agree.
    """
    sites, w = three()[1], np.array(WEIGHTS)
    trimmed = {
        path: np.where(kept(D, density, list(sites.values()) if scope == "adapter" else [D]), D, 0)
        for path, D in sites.items()
    }
    params = {"density": density, "scope": scope}
    close(found("magnitude_prune", params), {path: np.tensordot(w, D, 1) for path, D in trimmed.items()})
    close(found("ties", {**params, "lam": 0.5}), {path: 0.5 * voted(D, w) for path, D in trimmed.items()})
    signs = {path: np.sign(np.tensordot(w, D, 1)) for path, D in trimmed.items()}
    parts = {path: w[:, None, None] * D for path, D in trimmed.items()}
    close(
        found("ties", {**params, "normalize": False}),
        {path: np.where(np.sign(each) == signs[path], each, 0).sum(axis=0) for path, each in parts.items()},
    )


def test_breadcrumbs_leaves_out_both_ends() -> None:
    """The share gamma on top and what is beyond density at the bottom, of any size: a tensor of few entries
    is not emptied.
    """
    sites, w = three()[1], np.array(WEIGHTS)
    for density, gamma in ((0.7, 0.1), (0.9, 0.0), (0.5, 0.001)):
        wanted = {}
        for path, D in sites.items():
            band = kept(D, density + gamma, [D])
            if gamma:
                band &= ~kept(D, gamma, [D])
            wanted[path] = np.tensordot(w, np.where(band, D, 0), 1)
        close(found("breadcrumbs", {"density": density, "gamma": gamma, "scope": "tensor"}), wanted)
        if gamma == 0.1:
            assert 0.65 < np.mean(np.abs(wanted[PATHS[0]]) > 0) <= 1


def test_dare_keeps_each_entry_or_drops_it_and_is_right_on_average() -> None:
    """Entries are D / density or 0; over seeds their mean is D within five standard errors, and their share
    is the density.
    """
    D = three()[1][PATHS[0]][0]
    draws = np.array(
        [found("dare_linear", {"density": 0.3, "seed": seed}, [1.0])[PATHS[0]] for seed in range(60)]
    )
    scale = np.abs(D).max()
    on = np.abs(draws) > 1e-5 * scale
    np.testing.assert_allclose(draws[on], np.broadcast_to(D / 0.3, draws.shape)[on], atol=2e-5 * scale)
    big = np.abs(D) > 0.01 * scale  # those that a draw shows
    assert abs(on[:, big].mean() - 0.3) < 5 * np.sqrt(0.21 / on[:, big].size)
    assert (
        np.abs(draws.mean(axis=0) - D) < 5 * np.abs(D) * np.sqrt(0.7 / 0.3 / 60) + 1e-5 * scale
    ).mean() > 0.995


def test_della_divides_by_each_entrys_own_probability() -> None:
    """An entry that is kept is D / p with p by its rank in the row; small and large entries are right on
    average, each by itself.
    """
    D = three()[1][PATHS[0]][0]
    p = 0.5 - 0.2 + 2 * 0.2 * np.argsort(np.argsort(np.abs(D), axis=1), axis=1) / (D.shape[1] - 1)
    draws = np.array(
        [
            found("della_linear", {"density": 0.5, "epsilon": 0.2, "seed": seed}, [1.0])[PATHS[0]]
            for seed in range(60)
        ]
    )
    scale = np.abs(D).max()
    on = np.abs(draws) > 1e-5 * scale
    np.testing.assert_allclose(draws[on], np.broadcast_to(D / p, draws.shape)[on], atol=2e-5 * scale)
    for share in (p < 0.4, p > 0.6):
        ratio = np.sum(draws.mean(axis=0)[share] * D[share]) / np.sum(D[share] ** 2)
        assert ratio == pytest.approx(1, abs=0.1)  # mergekit's one global factor leaves 0.7 and 1.1 here


def test_equal_entries_share_a_rank() -> None:
    """In a row of equal entries, or of one, della drops as dare does: no probability is not a number."""
    sizes = np.array([[3, 1, 1, 2, 1], [5, 5, 5, 5, 5]], np.float32)
    np.testing.assert_array_equal(trim._ranks(sizes), [[4, 1, 1, 3, 1], [2, 2, 2, 2, 2]])
    packs = [made(1, LoRA(r=1, alpha=1), sites=[Site("narrow", 1, 50)])]
    found, plain = (
        deltas(Ours(rule).pack(packs, [1.0], {"density": 0.5})) for rule in ("della_linear", "dare_linear")
    )
    close(found, plain)


def test_dare_ties_votes_on_what_was_kept() -> None:
    """At density d the vote is TIES' on the very entries that dare_linear keeps."""
    sites, w = three()[1], np.array(WEIGHTS)
    packs = three()[0]
    single = [deltas(Ours("dare_linear").pack([pack], [1.0], {"density": 0.6})) for pack in packs]
    scale = {path: np.abs(D).max() for path, D in sites.items()}
    thinned = {
        path: np.array([np.where(np.abs(one[path]) > 1e-5 * scale[path], one[path], 0) for one in single])
        for path in PATHS
    }
    close(found("dare_ties", {"density": 0.6}), {path: voted(D, w) for path, D in thinned.items()})


def test_sce_emr_consensus_magmax_and_pcb() -> None:
    """Entry by entry, as their papers have them."""
    for path, D in three()[1].items():
        w = np.array(WEIGHTS)
        x = np.sign(w)[:, None, None] * D
        chosen = np.where(
            x.var(axis=0) >= np.sort(x.var(axis=0).ravel())[::-1][round(0.4 * x[0].size) - 1], D, 0
        )
        energy = np.abs(w) * np.mean(chosen**2, axis=(1, 2))
        close(
            {path: found("sce", {"density": 0.4})[path]},
            {path: voted(chosen, np.sign(w) * energy / energy.sum())},
        )
        parts = w[:, None, None] * D
        sign = np.sign(parts.sum(axis=0))
        unified = sign * np.where(np.sign(x) == sign, np.abs(x), 0).max(axis=0)
        close({path: found("emr", {})[path]}, {path: unified})
        mask = x[2] * unified > 0
        scale = np.abs(D[2]).sum() / np.abs(np.where(mask, unified, 0)).sum()
        close(
            {path: found("emr", {"task": "pack-3", "scope": "tensor"})[path]},
            {path: scale * np.where(mask, unified, 0)},
        )
        total = parts.sum(axis=0)
        important = sum(np.abs(part) > 0.3 * np.abs(total - part) for part in parts) >= 2
        close(
            {path: found("consensus", {"threshold": 0.3, "alpha": 0.5})[path]},
            {path: 0.5 * total * important},
        )
        close(
            {path: found("magmax", {})[path]},
            {path: np.take_along_axis(parts, np.abs(parts).argmax(axis=0)[None], axis=0)[0]},
        )
        merged, counted = 0.0, 0.0
        for t in range(3):
            ordered = np.sort(np.abs(D[t]).ravel())[::-1]
            low, high = ordered[-1], ordered[0]  # 0.01 % of these few entries is one
            norm = (np.clip(np.abs(D[t]), low, high) - low) / (high - low)
            score = np.maximum(np.exp(3 * norm**2) * np.tanh(x[t] * x.sum(axis=0)), 0)
            least = np.sort(score.ravel())[::-1][round(0.2 * score.size) - 1]
            score = np.maximum(score - least, 0) / (score.max() - least)
            merged, counted = merged + w[t] * score * D[t], counted + abs(w[t]) * score
        wanted = np.divide(merged, counted, out=np.zeros_like(D[0]), where=counted > 0)
        close({path: found("pcb", {"density": 0.2, "scope": "tensor"})[path]}, {path: wanted})


def angle(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.arccos(np.clip(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)))


def arc(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    th = angle(a, b)
    return (np.sin((1 - t) * th) * a + np.sin(t * th) * b) / np.sin(th)


def test_slerp_nuslerp_and_model_stock() -> None:
    """Along the arc of the flattened changes, of the whole adapter, of rows and of columns; the stock ratio
    of tensors and rows.
    """
    sites, t = three()[1], 0.4 / 1.1
    close(found("slerp", {}, [0.7, 0.4]), {path: arc(D[0], D[1], t) for path, D in sites.items()})
    close(found("slerp", {}, [0.7, -0.4]), {path: arc(D[0], -D[1], t) for path, D in sites.items()})
    flat = [np.concatenate([D[i].ravel() for D in sites.values()]) for i in range(2)]
    whole = arc(*flat, t)
    ends = np.cumsum([D[0].size for D in sites.values()])[:-1]
    close(
        found("slerp", {"scope": "adapter"}, [0.7, 0.4]),
        {
            path: part.reshape(D[0].shape)
            for (path, D), part in zip(sites.items(), np.split(whole, ends), strict=True)
        },
    )
    rows = {
        path: np.array([arc(a, b, t) for a, b in zip(D[0], D[1], strict=True)]) for path, D in sites.items()
    }
    close(found("nuslerp", {}, [0.7, 0.4]), rows)
    columns = {
        path: np.array([arc(a, b, t) for a, b in zip(D[0].T, D[1].T, strict=True)]).T
        for path, D in sites.items()
    }
    close(found("nuslerp", {"per": "column"}, [0.7, 0.4]), columns)

    def stock(D: np.ndarray) -> np.ndarray:
        cosine = max(
            0.0, np.cos(np.mean([angle(D[i], D[j]) for i, j in itertools.combinations(range(3), 2)]))
        )
        return np.asarray(3 * cosine / (1 + 2 * cosine) * np.tensordot([0.5, 0.25, 0.25], D, 1))

    close(found("model_stock", {}, [2, 1, 1]), {path: stock(D) for path, D in sites.items()})
    by_row = {path: np.array([stock(D[:, i]) for i in range(D.shape[1])]) for path, D in sites.items()}
    close(found("model_stock", {"per": "row"}, [2, 1, 1]), by_row)


def test_means_on_the_sphere() -> None:
    """multi_slerp by its formula; the Karcher mean as the direction in which the weighted tangents to all
    changes cancel.
    """
    a = np.array([0.5, 0.2, 0.3])
    for path, D in three()[1].items():
        lengths = np.linalg.norm(D, axis=(1, 2))
        units = D / lengths[:, None, None]
        mu = np.tensordot(a, units, 1)
        mu /= np.linalg.norm(mu)
        tangent = np.tensordot(a, units - np.sum(units * mu, axis=(1, 2))[:, None, None] * mu, 1)
        size = np.linalg.norm(tangent)
        wanted = a @ lengths * (np.cos(size) * mu + np.sin(size) * tangent / size)
        close({path: found("multi_slerp", {}, list(a))[path]}, {path: wanted})
        mean = found("karcher", {}, list(a))[path]
        assert np.linalg.norm(mean) == pytest.approx(a @ lengths, rel=1e-5)
        u = mean / np.linalg.norm(mean)
        th = [angle(u, unit) for unit in units]
        pull = sum(
            weight * each / np.sin(each) * (unit - np.cos(each) * u)
            for weight, each, unit in zip(a, th, units, strict=True)
        )
        assert np.linalg.norm(pull) < 1e-5
        # another mean than multi_slerp's
        assert np.linalg.norm(mean - wanted) > 1e-5 * np.linalg.norm(wanted)


def svd(D: np.ndarray, k: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(D)
    k = int(np.sum(s > 1e-5 * s[0])) if k is None else k
    return u[:, :k], s[:k], vt[:k].T


def nearest(X: np.ndarray) -> np.ndarray:
    """``X (X^T X)^{-1/2}``, by eigenvalues."""
    values, Q = np.linalg.eigh(X.T @ X)
    return np.asarray(X @ (Q / np.sqrt(values)) @ Q.T)


def test_tsv_iso_and_cart() -> None:
    """Against dense decompositions of the whole changes: triplets made orthogonal, a flat spectrum, ways from
    the mean.
    """
    w = np.array(WEIGHTS)
    for path, D in three()[1].items():
        parts = [svd(weight * one) for weight, one in zip(w, D, strict=True)]
        U, S, V = (np.concatenate([part[i] for part in parts], axis=-1) for i in range(3))
        close({path: found("tsv_m", {})[path]}, {path: nearest(U) * S @ nearest(V).T})
        u, s, v = svd(np.tensordot(w, D, 1))
        assert len(s) == 9
        close({path: found("iso_c", {"alpha": 1.5})[path]}, {path: 1.5 * s.mean() * u @ v.T})
        close({path: found("iso_c", {"mean": "site"})[path]}, {path: s.sum() / 17 * u @ v.T})
        k, own = 6, 1  # 0.7 of 9 directions, and of the 3 left one for each change
        shared = u[:, :k]
        beside = [
            svd(weight * one - shared @ shared.T @ (weight * one), own)
            for weight, one in zip(w, D, strict=True)
        ]
        U, S, V = (
            np.concatenate([first, *(part[i] for part in beside)], axis=-1)
            for i, first in enumerate((shared, s[:k], v[:, :k]))
        )
        close({path: found("iso_cts", {"common": 0.7})[path]}, {path: S.mean() * nearest(U) @ nearest(V).T})
        x, mean = np.sign(w)[:, None, None] * D, np.tensordot(w, D, 1) / np.abs(w).sum()
        ways = [svd(one - mean, 2) for one in x]
        close(
            {path: found("cart", {"lam": 0.3, "share_kept": 0.12})[path]},
            {path: mean + 0.3 * sum(u * s @ v.T for u, s, v in ways)},
        )


def test_iso_c_does_not_amplify_rounding() -> None:
    """A change of 1e-6 in one pack changes the result by as little: no direction of rounding is given
    weight.
    """
    packs = [made(1), made(2)]
    nudged = made(1, factor=1 + 1e-6)
    for rule in ("iso_c", "iso_cts", "tsv_m"):
        plain = Ours(rule).run(packs, [1, 1])
        for path, delta in Ours(rule).run([nudged, packs[1]], [1, 1]).items():
            assert np.linalg.norm(delta - plain[path]) < 2e-5 * np.linalg.norm(delta)


def test_knots_and_core_space_are_ties_in_their_coordinates() -> None:
    """The dense decompositions of all changes side by side give the coordinates, up to signs, which TIES does
    not see.
    """
    w = np.array(WEIGHTS)
    for path, D in three()[1].items():
        basis = svd(np.concatenate(list(D), axis=1))[0]
        X = basis.T @ D
        close(
            {path: found("knots_ties", {"density": 0.4, "scope": "tensor"})[path]},
            {path: basis @ voted(np.where(kept(X, 0.4, [X]), X, 0), w)},
        )
        halves = [(u * np.sqrt(s), v * np.sqrt(s)) for u, s, v in map(svd, D)]
        left, right = (svd(np.concatenate([half[i] for half in halves], axis=1))[0] for i in range(2))
        M = left.T @ D @ right
        np.testing.assert_allclose(left @ M @ right.T, D, atol=1e-5 * np.abs(D).max())
        close(
            {path: found("core_ties", {"density": 0.4, "scope": "tensor"})[path]},
            {path: left @ voted(np.where(kept(M, 0.4, [M]), M, 0), w) @ right.T},
        )
    pack = Ours("knots_ties").pack(three()[0], WEIGHTS)
    assert all(group.rank is not None and group.rank <= 9 for group in pack.manifest.groups)


def test_wudi_solves_its_equations() -> None:
    """The solution of the dense n x n system, and of a smaller loss than the sum's."""
    w = np.array(WEIGHTS)
    for path, D in three()[1].items():
        parts = w[:, None, None] * D
        C = [part.T @ part / np.sum(part**2) for part in parts]
        right = sum(part @ c for part, c in zip(parts, C, strict=True)) + 0.05 * parts.sum(axis=0)
        wanted = right @ np.linalg.inv(sum(C) + 0.05 * np.eye(D.shape[2]))
        result = found("wudi", {"ridge": 0.05})[path]
        close({path: result}, {path: wanted})
        loss = [
            sum(np.sum(((X - part) @ part.T) ** 2) / np.sum(part**2) for part in parts)
            for X in (result, parts.sum(axis=0))
        ]
        assert loss[0] < 0.5 * loss[1]


def test_regmean_solves_for_the_outputs() -> None:
    """The dense formula, and the least squared distance to each adapter's outputs on its own inputs: no
    direction makes it smaller.
    """
    packs, sites = three()
    w = np.array(WEIGHTS)
    for path, D in sites.items():
        G = [measured(pack, "moment").matrices[path].astype(np.float64) for pack in packs]
        scaled = [
            0.8 * g + 0.2 * np.diag(np.diag(g)) + 1e-3 * np.mean(np.diag(g)) * np.eye(len(g)) for g in G
        ]
        wanted = sum(a * d @ g for a, d, g in zip(w, D, scaled, strict=True)) @ np.linalg.inv(
            sum(abs(a) * g for a, g in zip(w, scaled, strict=True))
        )
        close({path: found("regmean", {"alpha": 0.8, "ridge": 1e-3})[path]}, {path: wanted})
        best = found("regmean", {"alpha": 1.0, "ridge": 1e-9}, [1.0, 1.0, 1.0])[path]

        def loss(X: np.ndarray, D: np.ndarray = D, G: list[np.ndarray] = G) -> float:
            return float(sum(np.trace((X - d) @ g @ (X - d).T) for d, g in zip(D, G, strict=True)))

        turn = np.random.default_rng(0).standard_normal(best.shape)
        assert all(loss(best) < loss(best + step * turn) for step in (1e-2, -1e-2)) and loss(best) < loss(
            D.mean(axis=0)
        )


def test_fisher_is_the_weighted_mean_of_every_entry() -> None:
    """sum w F D / sum |w| F with the floor, and with every F brought to the mean 1."""
    packs, sites = three()
    w = np.array(WEIGHTS)[:, None, None]
    for path, D in sites.items():
        F = np.array([measured(pack, "fisher").matrices[path] for pack in packs], np.float64)
        floored = F + 0.01 * F.mean()
        close(
            {path: found("fisher", {"floor": 0.01})[path]},
            {path: np.sum(w * floored * D, axis=0) / np.sum(np.abs(w) * floored, axis=0)},
        )
        even = F / F.mean(axis=(1, 2), keepdims=True) + 0.01
        close(
            {path: found("fisher", {"floor": 0.01, "normalize": True})[path]},
            {path: np.sum(w * even * D, axis=0) / np.sum(np.abs(w) * even, axis=0)},
        )


def test_ziplora_descends_on_its_loss() -> None:
    """One step is Adam's on a gradient of finite differences of the dense loss; a hundred lower the loss; lam
    drives columns apart.
    """
    sites = three()[1]
    w = np.array(WEIGHTS)

    def loss(x: np.ndarray, m_: np.ndarray, lam: float) -> float:
        X = sum(one * each for one, each in zip(x, m_, strict=True))
        kept = sum(np.sum(((X - one) @ one.T) ** 2) / np.sum((one @ one.T) ** 2) for one in x)
        pairs = sum(np.abs(m_[i] * m_[j]).mean() for i, j in itertools.combinations(range(len(x)), 2))
        return float(kept + lam * pairs)

    for path, D in sites.items():
        x = w[:, None, None] * D
        ones = np.ones((3, D.shape[2]))
        slope = np.zeros_like(ones)
        for place in np.ndindex(*ones.shape):
            step = np.zeros_like(ones)
            step[place] = 1e-5
            slope[place] = (loss(x, ones + step, 0.5) - loss(x, ones - step, 0.5)) / 2e-5
        close(
            {path: found("ziplora", {"steps": 1, "lam": 0.5, "rate": 0.01})[path]},
            {
                path: sum(
                    one * (each * (1 - 0.01 * np.sign(g)))
                    for one, each, g in zip(x, ones, slope, strict=True)
                )
            },
        )
        result = found("ziplora", {"lam": 0.0})[path]
        columns = np.array(
            [np.linalg.lstsq(x[:, :, k].T, result[:, k], rcond=None)[0] for k in range(D.shape[2])]
        ).T
        assert loss(x, columns, 0.0) < 0.5 * loss(x, ones, 0.0)
        apart = found("ziplora", {"lam": 50.0})[path]
        assert np.linalg.norm(apart) < np.linalg.norm(result)


def test_units() -> None:
    """LoRA-LEGO with a cluster a unit is the sum times sqrt(r / k); of one pack in two writings it is that
    pack: pairs fall together.
    """
    packs, sites = three()
    total = {path: np.tensordot(WEIGHTS, D, 1) * np.sqrt(4 / 9) for path, D in sites.items()}
    close(deltas(Ours("lora_lego").pack(packs, WEIGHTS, {"clusters": 9})), total)
    close(deltas(Ours("lora_lego").pack([made(1), made(1, turned=True)], [1, 1])), deltas(made(1)))
    A, S, B = 0.0, [], []
    path = PATHS[0]
    for weight, D in zip(WEIGHTS, sites[path], strict=True):
        u, s, v = (
            np.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, 4 - part.shape[-1])])
            for part in svd(abs(weight) * D)
        )
        u, v = (
            u * np.sign(u[np.abs(u).argmax(axis=0), range(4)]),
            v * np.sign(u[np.abs(u).argmax(axis=0), range(4)]),
        )
        a, b = v * np.sqrt(s), np.sign(weight) * u * np.sqrt(s)
        r = np.count_nonzero(s)
        size = np.abs(a).sum(axis=0)
        least = [
            np.sort(np.abs(half[:, :r]).ravel())[::-1][round(0.5 * half[:, :r].size) - 1] for half in (a, b)
        ]
        a, b = (np.where(np.abs(half) >= each, half, 0) for half, each in zip((a, b), least, strict=True))
        ratio = size[:r] / np.abs(a).sum(axis=0)[:r]
        A, B = A + a, [*B, b]
        S.append(np.pad(np.maximum(ratio, np.quantile(ratio, 0.8)), (0, 4 - r)))
    wanted = 4 * sum(b * share for b, share in zip(B, np.array(S) / np.sum(S, axis=0), strict=True)) @ A.T
    close({path: found("robust_merge", {"density": 0.5})[path]}, {path: wanted})


# Pieces.


def test_drawn_numbers_are_uniform_and_belong_to_their_place() -> None:
    """Equal for equal seed, key and place, in any blocks; else unlike; a fifth of them in each fifth."""
    whole = uniform(0, "a:b", slice(0, 200), 50)
    np.testing.assert_array_equal(whole[31:77], uniform(0, "a:b", slice(31, 77), 50))
    for other in (uniform(1, "a:b", slice(0, 200), 50), uniform(0, "a:c", slice(0, 200), 50)):
        assert abs(np.corrcoef(whole.ravel(), other.ravel())[0, 1]) < 0.05
    assert (whole >= 0).all() and (whole < 1).all()
    np.testing.assert_allclose(np.histogram(whole, 5, (0, 1))[0] / whole.size, 0.2, atol=0.02)


@pytest.mark.parametrize("rule", [name for name, rule in rules().items() if rule.needs == "D"])
def test_blocks_of_rows_do_not_show(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time or all at once: the same changes."""
    whole = Ours(rule).run([made(1), made(2)], [0.7, 0.4])
    monkeypatch.setattr(entries, "_BLOCK", 1)
    close(Ours(rule).run([made(1), made(2)], [0.7, 0.4]), whole)


@pytest.mark.parametrize("limit", [0, 1 << 26])
def test_a_large_site_is_cut_by_blocks_or_in_memory(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a site of 300 x 260, of many blocks and beyond the small SVD, the wanted rank comes out, with its
    loss.
    """
    monkeypatch.setattr(finish, "MAX_IN_MEMORY", limit)
    packs = [made(seed, LoRA(r=8, alpha=8), sites=[Site("big", 260, 300)]) for seed in (1, 2)]
    pack = adapterpack.compose(packs, rule="ties", weights=[0.5, 0.5], rank=12)
    D = np.array([deltas(one)["big"] for one in packs])
    wanted = voted(np.where(kept(D, 0.2, [D]), D, 0), np.array([0.5, 0.5]))
    s = np.linalg.svd(wanted, compute_uv=False)
    error = np.linalg.norm(deltas(pack)["big"] - wanted)
    # a random range finder is a little above the best
    assert error == pytest.approx(np.linalg.norm(s[12:]), rel=1e-2)
    assert pack.manifest.lineage is not None
    assert pack.manifest.lineage.params["truncation"]["total"] == pytest.approx(
        error / np.linalg.norm(s), rel=1e-4
    )
