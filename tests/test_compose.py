"""Composition: sums against their dense formula in float64 and against the laws; packs that do not go
together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from msgspec.structs import replace

import adapterpack
from adapterpack import LoRA
from adapterpack.adapter_methods import Site, get
from adapterpack.errors import (
    BaseMismatch,
    ConfigError,
    NonFinite,
    NothingToDo,
    OutputExists,
    UnknownName,
    Unsupported,
)
from adapterpack.lowrank.factors import Factors
from adapterpack.lowrank.spectra import spectrum
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build
from adapterpack.pack.validate.validation import load, validate
from adapterpack.quantizing.packs import quantize_pack

pytestmark = pytest.mark.fast

SITES = (
    Site("layers.0.q_proj", 33, 7),
    Site("layers.0.v_proj", 12, 40, bias=True),
    Site("layers.1.q_proj", 33, 7),
)
PLAIN = LoRA(r=3, alpha=5)
TOLERANCE = 4e-6
"""Of the norm of the terms: the factors are float32, and a QR, a product and a square root each round a few
times.
"""
BASE = m.Base("acme/base", None, "llama", "bfp1:" + "1" * 64, "bfp1:" + "2" * 64)


class Made(NamedTuple):
    """A pack, and its changes in float64 from the tensors that it was made of."""

    pack: Pack
    deltas: dict[str, np.ndarray]


def made(
    seed: int,
    cfg: LoRA = PLAIN,
    sites: tuple[Site, ...] = SITES,
    dtype: Any = np.float32,
    gauge: bool = False,
    **rest: Any,
) -> Made:
    rng = np.random.default_rng(seed)
    turn = np.random.default_rng(seed + 1000)
    adapters, deltas = {}, {}
    scale = cfg.alpha / (math.sqrt(cfg.r) if cfg.use_rslora else cfg.r)
    for site in sites:
        A, B = rng.standard_normal((cfg.r, site.in_features)), rng.standard_normal((site.out_features, cfg.r))
        A, B = A.astype(dtype).astype(np.float64), B.astype(dtype).astype(np.float64)
        deltas[site.path] = scale * B @ A
        if gauge:
            Q = turn.standard_normal((cfg.r, cfg.r)) + 2 * np.eye(cfg.r)
            A, B = Q @ A, B @ np.linalg.inv(Q)
        adapters[site] = (cfg, {"lora_A": A.astype(dtype), "lora_B": B.astype(dtype)})
    weights = {site.path: f"model.{site.path}.weight" for site in sites}
    settings = {"task": m.PackTask("text-generation"), "base": BASE, "weights": weights, **rest}
    return Made(build(f"pack-{seed}", get("lora"), adapters, **settings), deltas)


def headed(seed: int, labels: tuple[str, ...] | None = ("no", "yes"), **head: np.ndarray) -> Made:
    weights = {"weight": np.random.default_rng(seed).standard_normal((2, 5)).astype(np.float32), **head}
    return made(
        seed,
        task=m.PackTask("text-classification", "BertForSequenceClassification", labels),
        full={"classifier": weights},
    )


def deltas_of(pack: Pack) -> dict[str, np.ndarray]:
    """The changes of a composed pack from its stored tensors: B A, at scale 1."""
    found = {}
    for group in pack.manifest.groups:
        if group.role == "adapter":
            assert group.scale == 1.0
            A, B = (
                pack.tensors[f"base_model.model.{group.path}.{name}.weight"] for name in ("lora_A", "lora_B")
            )
            assert A.dtype == B.dtype == np.float32
            found[group.path] = B.astype(np.float64) @ A.astype(np.float64)
    return found


def weighted_sum(parts: list[Made], weights: list[float]) -> dict[str, np.ndarray]:
    """sum_i w_i D_i, over the union of the sites."""
    total: dict[str, Any] = {}
    for part, weight in zip(parts, weights, strict=True):
        for path, delta in part.deltas.items():
            total[path] = total.get(path, 0) + weight * delta
    return total


FORMULAS: dict[str, Callable[[list[Made], list[float]], dict[str, np.ndarray]]] = {
    "cat": weighted_sum,
    "linear": weighted_sum,
}
"""The rules of plain sums, dense; test_rules.py and test_rule_formulas.py have those of all rules."""


def close(
    found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], parts: list[Made], weights: list[float]
) -> None:
    assert found.keys() == wanted.keys()
    for path, delta in wanted.items():
        size = sum(
            abs(weight) * np.linalg.norm(part.deltas.get(path, 0))
            for part, weight in zip(parts, weights, strict=True)
        )
        np.testing.assert_array_less(np.linalg.norm(found[path] - delta), TOLERANCE * size + 1e-30)


def agrees(rule: str, parts: list[Made], weights: list[float]) -> None:
    composed = adapterpack.compose([part.pack for part in parts], rule=rule, weights=weights)
    close(deltas_of(composed), FORMULAS[rule](parts, weights), parts, weights)


# The laws. Each takes the name of a rule.


def identity(rule: str) -> None:
    """compose([p], [1]) = p."""
    agrees(rule, [made(1)], [1.0])


def formula(rule: str) -> None:
    """The result is the dense formula of the rule."""
    agrees(rule, [made(1), made(2), made(3)], [0.5, 0.3, 0.7])


def default_weights(rule: str) -> None:
    """Without weights, every pack counts 1/T."""
    parts = [made(1), made(2), made(3)]
    close(
        deltas_of(adapterpack.compose([part.pack for part in parts], rule=rule)),
        FORMULAS[rule](parts, [1 / 3] * 3),
        parts,
        [1 / 3] * 3,
    )


def permutation(rule: str) -> None:
    """The order of the packs changes nothing but rounding."""
    parts, weights = [made(1), made(2), made(3)], [0.5, -0.3, 0.7]
    turned = adapterpack.compose(
        [parts[i].pack for i in (2, 0, 1)], rule=rule, weights=[weights[i] for i in (2, 0, 1)]
    )
    close(
        deltas_of(turned),
        deltas_of(adapterpack.compose([part.pack for part in parts], rule=rule, weights=weights)),
        parts,
        weights,
    )


def gauge(rule: str) -> None:
    """B Q^-1, Q A is the same adapter as B, A for every invertible Q, so it composes to the same change."""
    plain, turned, other = made(1), made(1, gauge=True), made(2)
    first = next(iter(plain.pack.tensors))
    assert not np.allclose(plain.pack.tensors[first], turned.pack.tensors[first])
    found = deltas_of(adapterpack.compose([turned.pack, other.pack], rule=rule, weights=[0.6, 0.4]))
    wanted = FORMULAS[rule]([plain, other], [0.6, 0.4])
    # the turned factors were rounded to float32 anew, and their condition enters
    for path, delta in wanted.items():
        np.testing.assert_array_less(np.linalg.norm(found[path] - delta), 1e-5 * np.linalg.norm(delta))


def scale(rule: str) -> None:
    """A weight w on a pack is its change times w."""
    agrees(rule, [made(1)], [2.5])
    agrees(rule, [made(1)], [1e-3])


def negative(rule: str) -> None:
    """A negative weight takes a change away."""
    agrees(rule, [made(1), made(2)], [1.0, -1.0])
    agrees(rule, [made(1)], [-0.7])


def mixed_scales(rule: str) -> None:
    """Ranks, alphas and rsLoRA may differ from pack to pack."""
    agrees(
        rule,
        [
            made(1, LoRA(r=1, alpha=7)),
            made(2, LoRA(r=4, alpha=4, use_rslora=True)),
            made(3, LoRA(r=9, alpha=3)),
        ],
        [0.4, 0.8, -0.2],
    )


def rank_patterns(rule: str) -> None:
    """Within a pack, sites may differ in rank and alpha."""
    cfg, wide = LoRA(r=2, alpha=3), LoRA(r=5, alpha=1)
    narrow, broad = made(1, cfg, SITES[:1]), made(2, wide, SITES[1:])
    whole = build(
        "both",
        get("lora"),
        {item.site: (item.config, item.params) for part in (narrow, broad) for item in part.pack.adapters()},
        task=m.PackTask("text-generation"),
        base=BASE,
    )
    agrees(rule, [Made(whole, {**narrow.deltas, **broad.deltas}), made(3)], [0.9, 0.1])


def disjoint(rule: str) -> None:
    """A pack that lacks a site adds nothing there: the result has the union of the sites."""
    parts = [made(1, sites=SITES[:1]), made(2, sites=SITES[1:])]
    agrees(rule, parts, [0.5, 2.0])
    composed = adapterpack.compose([part.pack for part in parts], rule=rule)
    assert {group.path: group.weight for group in composed.manifest.groups} == {
        site.path: f"model.{site.path}.weight" for site in SITES
    }
    assert [group.bias for group in composed.manifest.groups] == [False, True, False]


def zero_weight(rule: str) -> None:
    """A pack of weight 0 adds nothing, and a site that only it has stays unchanged."""
    agrees(rule, [made(1, sites=SITES[:2]), made(2)], [1.0, 0.0])


def half_precision(rule: str) -> None:
    """Tensors in float16 are widened before a scale that float16 cannot hold is applied."""
    agrees(rule, [made(1, LoRA(r=3, alpha=5), dtype=np.float16), made(2)], [0.3, 0.6])


def double_precision(rule: str) -> None:
    """Tensors in float64 keep their precision until the result is rounded to float32."""
    agrees(rule, [made(1, dtype=np.float64), made(2)], [0.3, 0.6])


def wider_than_the_site(rule: str) -> None:
    """The ranks together may exceed the width of a site."""
    agrees(rule, [made(seed, LoRA(r=6, alpha=6)) for seed in range(4)], [1.0, -0.5, 0.25, 2.0])


def same_bytes(rule: str) -> None:
    """Composing twice gives the same pack."""
    packs = [made(1).pack, made(2).pack]
    assert adapterpack.compose(packs, rule=rule).id == adapterpack.compose(packs, rule=rule).id


LAWS = (
    identity,
    formula,
    default_weights,
    permutation,
    gauge,
    scale,
    negative,
    mixed_scales,
    rank_patterns,
    disjoint,
    zero_weight,
    half_precision,
    double_precision,
    wider_than_the_site,
    same_bytes,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("rule", sorted(FORMULAS))
def test_law(rule: str, law: Callable[[str], None]) -> None:
    """Rule x law."""
    law(rule)


@examples(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.floats(0.01, 64), st.booleans(), st.floats(-3, 3)),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(sorted(FORMULAS)),
)
def test_any_ranks_alphas_and_weights(adapters: list[tuple[int, float, bool, float]], rule: str) -> None:
    """The dense formula holds for whatever ranks, alphas, rsLoRA and weights."""
    parts = [
        made(seed, LoRA(r=r, alpha=alpha, use_rslora=rs), SITES[:2])
        for seed, (r, alpha, rs, _) in enumerate(adapters)
    ]
    weights = [weight for *_, weight in adapters]
    if any(abs(weight) > 1e-30 for weight in weights):
        agrees(rule, parts, weights)


# Rank, energy and loss.


def sizes(pack: Pack) -> dict[str, int | None]:
    return {group.path: group.rank for group in pack.manifest.groups if group.role == "adapter"}


def test_cat_adds_the_ranks_and_linear_finds_the_smallest() -> None:
    """cat: R = sum r_i. linear: the numerical rank, which for a pack and itself is the pack's own."""
    one, two = made(1, LoRA(r=3, alpha=5)), made(2, LoRA(r=2, alpha=9))
    assert set(sizes(adapterpack.compose([one.pack, two.pack], rule="cat")).values()) == {5}
    assert set(sizes(adapterpack.compose([one.pack, two.pack])).values()) == {5}
    assert set(sizes(adapterpack.compose([one.pack, made(1, gauge=True).pack, two.pack])).values()) == {5}
    assert set(sizes(adapterpack.compose([one.pack, one.pack])).values()) == {3}
    # small is not rounding
    assert set(sizes(adapterpack.compose([one.pack, two.pack], weights=[1, 1e-5])).values()) == {5}
    wide = adapterpack.compose([made(seed, LoRA(r=6, alpha=6)).pack for seed in range(4)])
    assert sizes(wide) == {"layers.0.q_proj": 7, "layers.0.v_proj": 12, "layers.1.q_proj": 7}


@pytest.mark.parametrize("rule", sorted(FORMULAS))
@pytest.mark.parametrize("rank", [1, 2, 4, 100])
def test_truncation_is_eckart_young(rule: str, rank: int) -> None:
    """|D - D_k|_F / |D|_F = sqrt(sum_{j>k} S_j^2 / sum S_j^2), in the manifest by site and in total, and in
    the tensors themselves.
    """
    parts, weights = [made(1), made(2, LoRA(r=4, alpha=4, use_rslora=True))], [0.7, -0.4]
    composed = adapterpack.compose([part.pack for part in parts], rule=rule, weights=weights, rank=rank)
    assert composed.manifest.lineage is not None
    stated = composed.manifest.lineage.params["truncation"]
    found, tails, totals = deltas_of(composed), 0.0, 0.0
    for path, delta in FORMULAS[rule](parts, weights).items():
        values = np.linalg.svd(delta, compute_uv=False)
        tail, total = float((values[rank:] ** 2).sum()), float((values**2).sum())
        tails, totals = tails + tail, totals + total
        assert sizes(composed)[path] == min(rank, 7)
        # The singular values carry float32 rounding, 1e-6 of the largest.
        assert stated["sites"][path] == pytest.approx(math.sqrt(tail / total), rel=1e-5, abs=1e-6)
        assert np.linalg.norm(found[path] - delta) == pytest.approx(
            math.sqrt(tail), rel=1e-5, abs=TOLERANCE * math.sqrt(total)
        )
    assert stated["total"] == pytest.approx(math.sqrt(tails / totals), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
def test_energy_keeps_the_smallest_rank_that_holds_it(energy: float) -> None:
    """k is the smallest with sum_{j<=k} S_j^2 >= q sum S_j^2, at every site for itself; the loss is at most
    sqrt(1 - q).
    """
    parts, weights = [made(1), made(2, LoRA(r=4, alpha=9))], [0.5, 0.5]
    composed = adapterpack.compose([part.pack for part in parts], weights=weights, energy=energy)
    for path, delta in weighted_sum(parts, weights).items():
        squares = np.linalg.svd(delta, compute_uv=False)[:7] ** 2
        shares = np.cumsum(squares) / squares.sum()
        kept = sizes(composed)[path]
        assert kept is not None
        assert shares[kept - 1] >= energy - 1e-6
        assert kept == 1 or shares[kept - 2] < energy
        assert composed.manifest.lineage is not None
        assert composed.manifest.lineage.params["truncation"]["sites"][path] <= math.sqrt(1 - energy) + 1e-6


def test_recompress_is_balanced_signed_and_keeps_the_dtype() -> None:
    """B = U sqrt(S), A = sqrt(S) V^T: both Gram matrices are S; the largest entry of every column of B is
    positive.
    """
    rng = np.random.default_rng(5)
    for dtype, tolerance in ((np.float32, 1e-5), (np.float64, 1e-12)):
        A, B = rng.standard_normal((5, 21)).astype(dtype), rng.standard_normal((13, 5)).astype(dtype)
        (down, up), lost = (svd := spectrum(Factors(A, B))).cut(len(svd.S))
        values = np.linalg.svd(B.astype(np.float64) @ A.astype(np.float64), compute_uv=False)[:5]
        assert (down.dtype, up.dtype, lost.tail) == (dtype, dtype, 0.0)
        for gram in (up.T @ up, down @ down.T):
            np.testing.assert_allclose(gram, np.diag(values), atol=tolerance * values[0])
        assert (up[np.argmax(np.abs(up), axis=0), np.arange(5)] > 0).all()


def test_changes_that_cancel_leave_nothing() -> None:
    """p - p is zero, and not rounding blown up to a rank: refused when nothing else is left, rank 1 of zeros
    where something is.
    """
    same, again = made(1), made(1, gauge=True)
    with pytest.raises(NothingToDo, match="zero at every site"):
        adapterpack.compose([same.pack, same.pack], weights=[1, -1])
    with pytest.raises(NothingToDo, match="zero at every site"):
        adapterpack.compose([same.pack], rule="cat", weights=[0])
    other = made(2, sites=SITES[:1])
    composed = adapterpack.compose([same.pack, again.pack, other.pack], weights=[1, -1, 1])
    assert sizes(composed) == {"layers.0.q_proj": 3, "layers.0.v_proj": 1, "layers.1.q_proj": 1}
    assert not np.any(deltas_of(composed)["layers.0.v_proj"])


@pytest.mark.fast
def test_progress_counts_every_site() -> None:
    """The bytes of all factors, up to all of them, one after another."""
    packs: list[Pack] = [made(1).pack, made(2).pack]
    seen: list[tuple[int, int]] = []
    adapterpack.compose(packs, progress=lambda done, total: seen.append((done, total)))
    size = sum(value.nbytes for pack in packs for value in pack.tensors.values())
    assert seen == sorted(seen) and seen[-1] == (size, size)


# What the result carries, and what is refused.


def test_the_pack_carries_its_history_and_is_written_whole(tmp_path: Any) -> None:
    """Parents by digest with weights, the operation, the base, the task; written, it validates and reads back
    the same; inputs stay.
    """
    paths = [made(seed).pack.write(tmp_path / f"in-{seed}").path for seed in (1, 2)]
    before = {file: file.read_bytes() for path in paths for file in path.iterdir()}
    composed = adapterpack.compose(paths, weights=[2, -1], rank=4, out=tmp_path / "both")
    manifest = composed.manifest
    assert manifest.lineage is not None
    assert (manifest.lineage.operation, manifest.lineage.params["rank"]) == ("linear", 4)
    assert manifest.lineage.parents == (
        m.Parent(made(1).pack.id, "pack-1", 2.0),
        m.Parent(made(2).pack.id, "pack-2", -1.0),
    )
    assert (manifest.base, manifest.task, manifest.canary, composed.name) == (
        BASE,
        m.PackTask("text-generation"),
        None,
        "both",
    )
    report = validate(tmp_path / "both")
    assert report.valid, report.findings
    assert load(tmp_path / "both").id == composed.id
    assert before == {file: file.read_bytes() for path in paths for file in path.iterdir()}
    with pytest.raises(OutputExists):
        adapterpack.compose(paths, out=tmp_path / "both")


def test_int8_packs_compose() -> None:
    """An int8 pack is composed as what it stands for: the change within its own stated error."""
    part = made(1)
    small = quantize_pack(part.pack)
    assert small.manifest.quantization is not None
    composed = adapterpack.compose([small])
    assert (composed.manifest.quantization, composed.manifest.must_understand) == (None, ())
    error = sum(np.linalg.norm(found - part.deltas[path]) ** 2 for path, found in deltas_of(composed).items())
    total = sum(np.linalg.norm(delta) ** 2 for delta in part.deltas.values())
    assert math.sqrt(error / total) == pytest.approx(small.manifest.quantization["relative_error"], rel=1e-3)


def test_heads_are_averaged() -> None:
    """A module trained whole becomes sum w_i W_i / sum w_i, in float32, with its labels."""
    parts, weights = [headed(1), headed(2)], [0.6, 1.8]
    composed = adapterpack.compose([part.pack for part in parts], weights=weights)
    first, second = (part.pack.full()["classifier"]["weight"].astype(np.float64) for part in parts)
    found = composed.full()["classifier"]["weight"]
    np.testing.assert_allclose(found, 0.25 * first + 0.75 * second, rtol=1e-6)
    assert (found.dtype, composed.manifest.task.labels) == (np.float32, ("no", "yes"))
    close(deltas_of(composed), weighted_sum(parts, weights), parts, weights)


def refused(packs: list[Made], error: type[Exception], *words: str, **options: Any) -> None:
    with pytest.raises(error) as raised:
        adapterpack.compose([part.pack for part in packs], **options)
    for word in (*words, "To fix it"):
        assert word in str(raised.value), str(raised.value)


def other_base(**fields: Any) -> Made:
    return made(2, base=replace(BASE, name="acme/other", **fields))


def test_packs_that_do_not_go_together_are_refused() -> None:
    """Another base, task, label list, head or shape is an error that names both sides and the way out;
    nothing is dropped.
    """
    refused(
        [made(1), other_base(content="bfp1:" + "3" * 64)], BaseMismatch, "acme/base", "acme/other", "content"
    )
    refused(
        [made(1), other_base(structure="bfp1:" + "3" * 64, content=None)],
        BaseMismatch,
        "acme/base",
        "acme/other",
        "structure",
    )
    refused(
        [made(1), made(2, task=m.PackTask("feature-extraction"))],
        Unsupported,
        "text-generation",
        "feature-extraction",
    )
    refused([headed(1), headed(2, ("bad", "good"))], Unsupported, "no, yes", "bad, good", "bank bundle")
    refused([headed(1), headed(2, None)], Unsupported, "no, yes", "no labels")
    refused(
        [headed(1), made(2, task=m.PackTask("text-classification", None, ("no", "yes")))],
        Unsupported,
        "pack-2",
        "classifier",
    )
    refused([headed(1), headed(2, bias=np.ones(2, np.float32))], Unsupported, "bias")
    refused([headed(1), headed(2)], Unsupported, "sum to 0", weights=[1, -1])
    refused(
        [made(1), made(2, sites=(Site("layers.0.q_proj", 33, 8),))],
        Unsupported,
        "layers.0.q_proj",
        "[7, 33]",
        "[8, 33]",
    )
    refused(
        [made(1), made(2, sites=(Site("layers.0.q_proj", 33, 7, "embedding"),))], Unsupported, "embedding"
    )
    refused([made(1, sites=(Site("tokens", 33, 7, "router"),))], Unsupported, "router")


def test_a_base_that_is_not_known_everywhere_is_taken_from_where_it_is() -> None:
    """A pack without digests goes with any; the result belongs to the base whose digests are known."""
    parts = [made(1, base=m.Base("elsewhere/name")), made(2)]
    assert adapterpack.compose([part.pack for part in parts]).manifest.base == BASE


def test_wrong_requests_are_refused() -> None:
    """Every option that cannot be used is an error that says which, and what would do."""
    refused([], NothingToDo, "no packs")
    two = [made(1), made(2)]
    refused(two, ConfigError, "expected 2", "found 3", weights=[1, 2, 3])
    refused(two, ConfigError, "finite", weights=[1, math.inf])
    refused(two, ConfigError, "finite", weights=[math.nan, 1])
    for rule in FORMULAS:
        refused(two, NonFinite, "layers.0.q_proj", "smaller weights", rule=rule, weights=[1e39, 1])
    for cut in ({"rank": 1}, {"energy": 0.5}, {"budget": 0.5}):
        refused(two, NonFinite, "layers.0.q_proj", "smaller weights", rule="linear", weights=[1e39, 1], **cut)
        refused(
            two, NonFinite, "layers.0.q_proj", "smaller weights", rule="linear", weights=[1e308, 1], **cut
        )
    refused(two, UnknownName, "'liner'", "did you mean 'linear'", rule="liner")
    refused(two, ConfigError, "no such parameter", "density", rule="cat", params={"density": 0.2})
    refused(two, ConfigError, "rank", rank=0)
    refused(two, ConfigError, "energy", energy=1.5)
    refused(two, ConfigError, "name", name="two words")
    refused(two * 33, Unsupported, "64")


@pytest.mark.parametrize("rank", [2.0, math.nan, math.inf, "2", True, 0])
def test_a_rank_is_a_whole_number(rank: Any) -> None:
    """Of a composition, a resized pack, an audit's cuts and the bases of a fleet."""
    packs = [made(1).pack, made(2).pack]
    for refused in (
        lambda: adapterpack.compose(packs, rank=rank),
        lambda: adapterpack.resize(packs[0], rank=rank),
        lambda: adapterpack.audit(packs, ranks=(rank,)),
        lambda: adapterpack.compress(packs, basis=rank),
    ):
        with pytest.raises(ConfigError):
            refused()
