"""The factor space against dense float64 formulas, and its laws: what it says depends on changes and not on
how they are factored.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import adapterpack
from adapterpack.adapter_methods import Method, Site, fold, get, methods, resolve_configs
from adapterpack.composing.as_factors import represent
from adapterpack.errors import ConfigError, Unsupported
from adapterpack.lowrank import factors as space
from adapterpack.lowrank.factors import Factors, Term
from adapterpack.lowrank.range_finder import InMemory, largest, residual
from adapterpack.lowrank.spectra import Change, recompress_all, spectra, spectrum
from adapterpack.lowrank.truncation import Cut, shared_out
from adapterpack.pack.pack import Adapter

pytestmark = pytest.mark.fast

FLOAT32 = 4e-6
"""Of the norm of the terms: factors in float32, with a few roundings each."""


def term(
    rng: np.random.Generator, m: int, n: int, r: int, weight: float = 1.0, dtype: Any = np.float32
) -> Term:
    return Term(rng.standard_normal((r, n)).astype(dtype), rng.standard_normal((m, r)).astype(dtype), weight)


def dense(one: Term) -> np.ndarray:
    return one.B.astype(np.float64) @ one.A.astype(np.float64)


def recompress(change: Change) -> Factors:
    """The change in as few terms as it needs."""
    return recompress_all([change], Cut())[0][0]


def turned(rng: np.random.Generator, one: Term) -> Term:
    """The same change in other factors: M A and B M^-1."""
    M = np.linalg.qr(rng.standard_normal((len(one.A), len(one.A))))[0] * rng.uniform(0.5, 2, len(one.A))
    return Term((M @ one.A).astype(one.A.dtype), (one.B @ np.linalg.inv(M)).astype(one.B.dtype), one.weight)


TERMS = st.lists(st.tuples(st.integers(0, 6), st.floats(-3, 3, width=32)), min_size=1, max_size=4)
SIDES = st.tuples(st.integers(1, 23), st.integers(1, 23))


def drawn(sides: tuple[int, int], ranks: list[tuple[int, float]], dtype: Any = np.float64) -> list[Term]:
    rng = np.random.default_rng(7)
    return [term(rng, *sides, r, weight, dtype) for r, weight in ranks]


@examples(max_examples=60, deadline=None)
@given(SIDES, TERMS)
def test_inner_products_are_those_of_the_dense_changes(
    sides: tuple[int, int], ranks: list[tuple[int, float]]
) -> None:
    """gram, row_gram and column_gram hold <D_i, D_j>, of all entries, of rows and of columns, for any ranks,
    0 among them.
    """
    terms = drawn(sides, ranks)
    changes = np.array([dense(one) for one in terms])
    atol = 1e-11 * (1 + np.abs(changes).max() ** 2 * math.prod(sides))  # float64 sums
    np.testing.assert_allclose(space.gram(terms), np.einsum("imn,jmn->ij", changes, changes), atol=atol)
    np.testing.assert_allclose(space.row_gram(terms), np.einsum("imn,jmn->mij", changes, changes), atol=atol)
    np.testing.assert_allclose(
        space.column_gram(terms), np.einsum("imn,jmn->nij", changes, changes), atol=atol
    )
    assert space.inner(terms[0].change, terms[-1].change) == pytest.approx(
        float(np.sum(changes[0] * changes[-1])), abs=atol
    )


@examples(max_examples=60, deadline=None)
@given(SIDES, TERMS)
def test_core_and_stack_hold_the_changes(sides: tuple[int, int], ranks: list[tuple[int, float]]) -> None:
    """left core_i right^T is D_i; the stack is sum w_i D_i; its rows come in blocks; a term of weight 0 is
    absent.
    """
    terms = drawn(sides, ranks)
    found = space.core(terms)
    for index, one in enumerate(terms):
        np.testing.assert_allclose(found.change(found.cores[index]).dense(), dense(one), atol=1e-10)
    for basis in (found.left, found.right):
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-12)
    total, wanted = space.stack(terms), sum(one.weight * dense(one) for one in terms)
    np.testing.assert_allclose(total.dense(), wanted, atol=1e-10)
    np.testing.assert_allclose(
        np.concatenate([block for _, block in space.blocks(total, 30)]), wanted, atol=1e-10
    )
    present = [one for one in terms if one.weight and len(one.A)]
    if present:
        assert np.array_equal(space.stack(present).A, total.A)


@examples(max_examples=80, deadline=None)
@given(SIDES, st.integers(0, 9), st.integers(0, 1), st.sampled_from([np.float32, np.float64]))
def test_spectra_are_those_of_the_dense_change(
    sides: tuple[int, int], rank: int, twice: int, dtype: Any
) -> None:
    """S, U and V are the SVD of B A, whatever the rank; repeated columns, which have no Cholesky factor, and
    zeros too.
    """
    rng = np.random.default_rng(3)
    one = term(rng, *sides, rank, dtype=dtype)
    if twice:
        one = Term(np.concatenate([one.A, one.A]), np.concatenate([one.B, one.B], axis=1), 1.0)
    found, values = spectrum(one.change), np.linalg.svd(dense(one), compute_uv=False)
    eps = float(np.finfo(dtype).eps)
    size = 1e-30 + np.linalg.norm(one.A.astype(float)) * np.linalg.norm(one.B.astype(float))
    k = len(found.S)
    assert k <= min(*sides, rank)
    np.testing.assert_allclose(found.S, values[:k], atol=20 * eps * size)
    assert np.all(values[k:] <= 20 * eps * size)
    np.testing.assert_allclose((found.U * found.S) @ found.V.T, dense(one), atol=20 * eps * size)
    np.testing.assert_allclose(found.U.T @ found.U, np.eye(k), atol=200 * eps)
    assert (found.U.dtype, found.V.dtype) == (dtype, dtype)


@examples(max_examples=40, deadline=None)
@given(SIDES, st.integers(1, 6), st.integers(1, 6))
def test_gauge(sides: tuple[int, int], r1: int, r2: int) -> None:
    """B M^-1, M A is the same change: the same inner products, singular values, angles and best
    approximation.
    """
    rng = np.random.default_rng(11)
    a, b = term(rng, *sides, r1, dtype=np.float64), term(rng, *sides, r2, -0.4, dtype=np.float64)
    c = turned(rng, a)
    np.testing.assert_allclose(space.gram([c, b]), space.gram([a, b]), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(spectrum(c.change).S, spectrum(a.change).S, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(
        space.angles(c.change, b.change).left, space.angles(a.change, b.change).left, atol=1e-7
    )
    np.testing.assert_allclose(
        recompress(space.stack([c, b])).dense(), recompress(space.stack([a, b])).dense(), atol=1e-8
    )


@examples(max_examples=40, deadline=None)
@given(SIDES, TERMS, st.permutations(range(4)))
def test_permutation_and_scaling(
    sides: tuple[int, int], ranks: list[tuple[int, float]], order: list[int]
) -> None:
    """The order of the terms changes nothing but rounding; weights scale the change."""
    terms = drawn(sides, ranks)
    again = [terms[index] for index in order if index < len(terms)]
    total = recompress(space.stack(terms)).dense()
    np.testing.assert_allclose(recompress(space.stack(again)).dense(), total, atol=1e-9)
    doubled = [one._replace(weight=2 * one.weight) for one in terms]
    np.testing.assert_allclose(recompress(space.stack(doubled)).dense(), 2 * total, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_change_less_itself_is_nothing(dtype: Any, size: float) -> None:
    """a - a = 0, in whatever factors: no singular value of rounding is taken for a rank."""
    rng = np.random.default_rng(5)
    a = term(rng, 40, 30, 4, size, dtype)
    for again in (a, turned(rng, a)):
        assert len(spectrum(space.stack([a, again._replace(weight=-size)])).S) == 0


@examples(max_examples=60, deadline=None)
@given(SIDES, TERMS)
def test_a_sum_is_what_its_factors_are_side_by_side(
    sides: tuple[int, int], ranks: list[tuple[int, float]]
) -> None:
    """A sum that nobody has put side by side has the shape, the rank, the numbers and the singular values of
    the one that is: in float32 to the rounding of ``B`` times its weight and factor, and of what is computed
    of it.
    """
    terms = [one._replace(factor=-0.75) for one in drawn(sides, ranks, np.float32)]
    truth = np.sum([one.weight * dense(one) for one in terms], axis=0)
    room = FLOAT32 * max(1e-30, sum(abs(one.weight) * np.linalg.norm(dense(one)) for one in terms))
    total, whole = space.weighted_sum(terms), space.stack(terms)
    assert (total.shape, total.rank) == (whole.shape, whole.rank) == (truth.shape, len(whole.A))
    assert np.abs(whole.dense() - truth).max(initial=0.0) <= room
    for found in (spectrum(total), spectrum(whole)):
        made = found.cut(len(found.S))[0].dense() if len(found.S) else np.zeros(truth.shape)
        assert np.abs(made - truth).max(initial=0.0) <= room


def test_parts_of_several_dtypes_are_one_sum() -> None:
    """The widest counts: a float32 part is taken as it is, not as if it had more digits."""
    rng = np.random.default_rng(3)
    terms = [term(rng, 30, 20, 3, 0.5, np.float32), term(rng, 30, 20, 2, -2.0, np.float64)]
    found = spectrum(space.weighted_sum(terms))
    truth = np.linalg.svd(np.sum([one.weight * dense(one) for one in terms], axis=0), compute_uv=False)[:5]
    assert found.U.dtype == space.stack(terms).B.dtype == np.float64
    np.testing.assert_allclose(found.S, truth, rtol=1e-12)


def test_many_shapes_at_once() -> None:
    """spectra gives in the order asked what spectrum gives one by one, byte for byte whatever else is
    asked.
    """
    rng = np.random.default_rng(6)
    changes = [
        term(rng, m, n, r).change
        for m, n, r in [(9, 7, 2), (40, 7, 3), (9, 7, 2), (5, 6, 0), (300, 200, 8)] * 3
    ]
    for one, found in zip(changes, spectra(changes), strict=True):
        alone = spectrum(one)
        np.testing.assert_allclose(found.S, alone.S, rtol=1e-12)
        np.testing.assert_allclose(found.U, alone.U, atol=1e-6)
    assert all(np.array_equal(a.U, b.U) for a, b in zip(spectra(changes), spectra(changes), strict=True))


def test_ill_conditioned_factors_keep_their_small_directions() -> None:
    """Columns that are nearly parallel go through Householder: the product is right to float32 of the
    factors' size.
    """
    rng = np.random.default_rng(8)
    B = rng.standard_normal((60, 5))
    B[:, 4] = B[:, 0] + 1e-5 * B[:, 4]
    change = Factors(rng.standard_normal((5, 50)).astype(np.float32), B.astype(np.float32))
    wanted = change.B.astype(float) @ change.A.astype(float)
    assert np.linalg.norm(recompress(change).dense() - wanted) <= FLOAT32 * np.linalg.norm(
        change.A
    ) * np.linalg.norm(change.B)


def test_principal_angles() -> None:
    """The angles between known planes; shared directions give 1, orthogonal ones 0."""
    rng = np.random.default_rng(9)
    Q = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    one = Factors(rng.standard_normal((2, 9)), Q[:, :2])
    two = Factors(
        rng.standard_normal((2, 9)),
        np.stack([Q[:, 0], np.cos(0.3) * Q[:, 1] + np.sin(0.3) * Q[:, 5]], axis=1),
    )
    np.testing.assert_allclose(space.angles(one, two).left, [1.0, math.cos(0.3)], atol=1e-12)
    np.testing.assert_allclose(space.angles(one, Factors(one.A, Q[:, 6:8])).left, 0, atol=1e-12)


# Cuts.


@examples(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=12), st.floats(0.05, 1))
def test_criteria(values: list[float], share: float) -> None:
    """Each criterion by its own definition; a rank caps any."""
    S = np.sort(np.array(values))[::-1]
    near = 1 - 1e-12
    squares, sums = np.cumsum(S**2), np.cumsum(S)
    for cut, held, wanted in (
        (Cut(energy=share), squares, share * squares[-1]),
        (Cut(sv_fro=share), squares, share**2 * squares[-1]),
        (Cut(sv_cumulative=share), sums, share * sums[-1]),
    ):
        k = cut.kept(S)
        assert held[k - 1] >= wanted * near
        assert k == 1 or held[k - 2] < wanted / near
    ratio = 1 / share
    assert Cut(sv_ratio=ratio).kept(S) == max(1, sum(value * ratio > S[0] for value in S))
    assert Cut(rank=2, energy=share).kept(S) == min(2, Cut(energy=share).kept(S))


def test_wrong_cuts_are_refused() -> None:
    """A value out of range, or two criteria, is an error that says which."""
    for wrong in (
        {"rank": 0},
        {"rank": 1.5},
        {"energy": 0.0},
        {"energy": 1.1},
        {"sv_ratio": 0.5},
        {"sv_fro": -1},
        {"sv_cumulative": 2},
        {"energy": 0.9, "sv_fro": 0.9},
        {"energy": math.nan},
        {"sv_ratio": math.inf},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Cut(**wrong)  # type: ignore[arg-type]


@examples(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.floats(0.1, 10), max_size=4), st.integers(1, 6)), min_size=1, max_size=4),
    st.integers(0, 40),
)
def test_a_budget_is_shared_out_with_the_least_error(
    sites: list[tuple[list[float], int]], budget: int
) -> None:
    """No ranks that cost at most what was used leave a smaller error: against all allotments."""
    spectra_ = [np.sort(np.array(values))[::-1] for values, _ in sites]
    costs = [cost for _, cost in sites]
    kept = shared_out(spectra_, costs, budget)
    used = sum(k * cost for k, cost in zip(kept, costs, strict=True))
    assert used <= budget

    def error(ranks: Any) -> float:
        return sum(float((S[k:] ** 2).sum()) for k, S in zip(ranks, spectra_, strict=True))

    every = np.array(np.meshgrid(*[np.arange(len(S) + 1) for S in spectra_])).reshape(len(sites), -1).T
    affordable = [ranks for ranks in every if int(ranks @ np.array(costs)) <= budget]
    most = max((float(S[0]) ** 2 for S in spectra_ if len(S)), default=0.0)
    best = min(error(ranks) for ranks in affordable)
    assert error(kept) <= best + most * 1.000001  # one value from the least: the last may not fit
    if len(set(costs)) == 1:
        assert error(kept) == pytest.approx(best, abs=1e-9)


# The range finder.


def falling(m: int, n: int, S: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
    rng = np.random.default_rng(1)
    U, V = (np.linalg.qr(rng.standard_normal((side, len(S))))[0] for side in (m, n))
    return ((U * S) @ V.T).astype(dtype)


@pytest.mark.parametrize(("m", "n"), [(200, 333), (333, 200), (50, 400)])
def test_the_finder_finds_what_the_whole_svd_finds(m: int, n: int) -> None:
    """Singular values of a slowly falling spectrum to 1 %, the error of the cut exact, and within 1 % of the
    least possible.
    """
    D = falling(m, n, 1 / np.arange(1, 51))
    values = np.linalg.svd(D.astype(float), compute_uv=False)
    for cut in (Cut(rank=7), Cut(energy=0.97), Cut(sv_fro=0.98), Cut(rank=30, energy=0.9), Cut(sv_ratio=9)):
        factors, loss = largest(InMemory(D), cut).cut(cut)
        left = float(np.linalg.norm(D - factors.dense()) ** 2)
        assert loss.tail == pytest.approx(left, rel=1e-3)
        assert loss.total == pytest.approx(float(np.linalg.norm(D.astype(float)) ** 2), rel=1e-5)
        assert left <= 1.01 * float((values[len(factors.A) :] ** 2).sum())
        assert residual(InMemory(D), factors).tail == pytest.approx(left, rel=1e-4)
        if cut.energy:
            assert cut.rank == len(factors.A) or left <= (1 - cut.energy) * loss.total * 1.0001


def test_the_finder_stops_where_noise_begins() -> None:
    """With noise as large as told, only the directions above it are looked for; zeros have none."""
    rng = np.random.default_rng(2)
    noise = 1e-3 * rng.standard_normal((300, 260))
    found = largest(
        InMemory((falling(300, 260, np.full(5, 3.0)) + noise).astype(np.float32)),
        Cut(),
        noise=float(np.sum(noise**2)) * 1.05,
    )
    assert len(found.spectrum.S) < 60
    assert found.spectrum.S[4] > 2.9
    assert found.spectrum.S[5] < 0.05
    assert largest(InMemory(np.zeros((90, 80), np.float32)), Cut(energy=0.9)).total == 0


# Adapters of any method.

WIDTHS = (24, 20)


def adapter_of(method: Method, cfg: Any, weight: np.ndarray, bias: np.ndarray | None) -> Adapter:
    """A random adapter of a method at one linear site; every floating parameter is moved, so that nothing is
    at its start.
    """
    rng = np.random.default_rng(4)
    known = Site("layer", *WIDTHS, bias=bias is not None, weight=weight, base_bias=bias)
    (cfg,) = resolve_configs(method, [cfg], [known])
    params = dict(method.init(cfg, known, rng))
    if method.storage.shared is not None:
        params |= method.storage.shared.init(cfg, [known], rng)
    frozen = method.traits.frozen
    moved = {
        name: (value + 0.3 * rng.standard_normal(value.shape)).astype(value.dtype)
        if np.issubdtype(value.dtype, np.floating) and name not in frozen
        else value
        for name, value in params.items()
    }
    return Adapter(Site("layer", *WIDTHS, bias=bias is not None), cfg, moved, "layer.weight", method)


class Base:
    """What a method that reads the base needs of a checkpoint."""

    def __init__(self, folder: Path, weight: np.ndarray) -> None:
        from adapterpack.base.checkpoint import Checkpoint
        from adapterpack.io import safetensors

        folder.mkdir()
        safetensors.write(folder / "model.safetensors", {"layer.weight": weight})
        self.opened = Checkpoint(folder)


WEIGHTS = sorted(
    name
    for name, method in methods().items()
    if method.kind == "weight"
    and method.traits.layers[0] == "linear"
    and not method.is_positional
    and not method.reason_against("fold")
)


@pytest.mark.parametrize("name", WEIGHTS)
def test_any_method_becomes_factors(name: str, tmp_path: Path) -> None:
    """The factors are the change that the fold makes of the weight; exact, or off by no more than they say;
    or refused with a reason.
    """
    from adapterpack.adapter_methods import complete

    method = get(name)
    weight = np.random.default_rng(0).standard_normal((WIDTHS[1], WIDTHS[0])).astype(np.float32)
    cfg = method.examples[0]
    adapter = adapter_of(method, cfg, weight, None)
    known = Site("layer", *WIDTHS, weight=weight)
    params = complete(method, adapter.config, adapter.params, known)
    folded, bias = fold(method, adapter.config, params, known, weight, None)
    base, most = Base(tmp_path / "base", weight).opened, Cut(rank=min(WIDTHS))
    if bias is not None and np.any(bias):
        with pytest.raises(Unsupported, match="bias"):
            represent(adapter, base=base, cut=most)
        return
    delta = folded.astype(np.float64) - weight
    full = represent(adapter, base=base, cut=most)
    size = np.linalg.norm(delta) + np.linalg.norm(weight)
    np.testing.assert_allclose(full.factors.dense(), delta, atol=1e-5 * size)
    if not full.exact:
        with pytest.raises(Unsupported, match="rank"):
            represent(adapter, base=base)
        cut = represent(adapter, base=base, cut=Cut(rank=3))
        assert len(cut.factors.A) <= 3
        assert np.linalg.norm(cut.factors.dense() - delta) == pytest.approx(
            math.sqrt(cut.loss.tail), rel=1e-3, abs=1e-5 * size
        )
    if method.traits.reads_weight or not method.traits.additive:
        with pytest.raises(Unsupported, match="base"):
            represent(adapter, cut=most)
    elif method.traits.low_rank:
        assert represent(adapter).exact


def test_a_kronecker_product_of_low_rank_is_exact() -> None:
    """The factors of kron(w1, w2) are the products of those of its parts, so a narrow one needs no
    approximation.
    """
    cfg = adapterpack.LoKr(r=1, alpha=2, decompose_both=True, decompose_factor=4)
    lokr = get("lokr")
    adapter = adapter_of(lokr, cfg, np.zeros((WIDTHS[1], WIDTHS[0]), np.float32), None)
    found = represent(adapter)
    assert found.exact
    wanted = lokr.normal_form(adapter.config, adapter.params, adapter.site).down.dense()
    np.testing.assert_allclose(found.factors.dense(), wanted, atol=1e-5)
