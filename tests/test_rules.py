"""Rules of combination: every law over the whole registry, PEFT beside it, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from peft_rules import TYPES, Peft, changes, loaded
from rule_catalogue import page, peft_page
from rule_laws import EQUAL, LAWS, SITES, Combiner, Ours, close, deltas, made, measured, verdict

import adapterpack
from adapterpack import LoRA
from adapterpack.adapter_methods import get as method
from adapterpack.adapter_methods.ia3 import IA3
from adapterpack.composing.rules.rule import RULES, Laws, rules
from adapterpack.composing.steps import RankChosen
from adapterpack.errors import AdapterpackError, ConfigError, Unsupported
from adapterpack.lowrank.factors import Term
from adapterpack.manifest.structs import PackTask
from adapterpack.pack.pack import build
from adapterpack.pack.validate.validation import load, validate

pytestmark = pytest.mark.fast
PATHS = [site.path for site in SITES]
DOCS = Path(__file__).parents[1] / "docs" / "rules.md"
WEIGHTS = [0.7, -0.4, 1.1]


# Laws.


def test_there_are_rules() -> None:
    assert len(rules()) >= 41


def test_every_trait_is_a_law() -> None:
    """The traits are the first laws, in order; the rest hold for all rules."""
    assert [law.__name__ for law in LAWS][: len(Laws._fields)] == list(Laws._fields)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("rule", rules())
def test_law(rule: str, law: Callable[[Combiner], None]) -> None:
    """The law holds where the rule says so, and is broken or refused where it does not: no rule can excuse
    itself from a law it keeps.
    """
    if getattr(RULES[rule].laws, law.__name__, True):
        law(Ours(rule))
    else:
        with pytest.raises((AssertionError, AdapterpackError)):
            law(Ours(rule))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rule", rules())
def test_bytes_depend_on_nothing_else(rule: str) -> None:
    """Twice the same pack; a pack of weight 0 changes no bit; a site alone is what it is among others, if
    each is measured for itself.
    """
    ours = Ours(rule)
    packs = [made(seed) for seed in range(1, 1 + len(ours.weights))]
    assert ours.pack(packs, ours.weights).id == ours.pack(packs, ours.weights).id
    with_it, without = ours.pack([*packs, made(9)], [*ours.weights, 0.0]), ours.pack(packs, ours.weights)
    assert all(np.array_equal(value, without.tensors[name]) for name, value in with_it.tensors.items())
    params = {"scope": "tensor"} if "scope" in RULES[rule].parameters else {}
    alone = ours.pack(
        [made(seed, sites=SITES[:1]) for seed in range(1, 1 + len(ours.weights))], ours.weights, params
    )
    among = ours.pack(packs, ours.weights, params)
    assert all(np.array_equal(value, among.tensors[name]) for name, value in alone.tensors.items())


def test_a_seed_is_the_rules_too() -> None:
    """``seed`` of compose is the rule's, unless its parameters say otherwise."""
    packs = [made(1), made(2)]
    one, two, three = (
        adapterpack.compose(packs, rule="dare_linear", rank=17, **options).id
        for options in ({"seed": 5}, {"params": {"seed": 5}}, {"seed": 6})
    )
    assert one == two != three


@pytest.mark.parametrize("rule", rules())
def test_a_pack_may_lack_a_site(rule: str) -> None:
    """There the others alone are combined; with a weight of 0 on those, nothing is there."""
    found = Ours(rule).run([made(1), made(2, sites=SITES[:1])], [0.7, 0.4])
    assert found.keys() == set(PATHS)
    assert all(np.isfinite(delta).all() for delta in found.values())
    left = Ours(rule).run([made(1), made(2, sites=SITES[:1])], [0.0, 0.4])
    assert not left[PATHS[1]].any()


def test_a_written_pack_says_how_it_was_made(tmp_path: Path) -> None:
    """The rule and all its parameters, and what the rank cut off, are in the lineage; the folder
    validates.
    """
    pack = adapterpack.compose(
        [made(1), made(2)], rule="della", params={"density": 0.4}, rank=5, out=tmp_path / "out"
    )
    assert validate(tmp_path / "out").valid
    lineage = load(tmp_path / "out").manifest.lineage
    assert lineage is not None
    assert (lineage.operation, lineage.params["density"], lineage.params["seed"], lineage.params["rank"]) == (
        "della",
        0.4,
        0,
        5,
    )
    whole = deltas(adapterpack.compose([made(1), made(2)], rule="della", params={"density": 0.4}, rank=17))
    lost = {
        path: np.linalg.norm(whole[path] - delta) / np.linalg.norm(whole[path])
        for path, delta in deltas(pack).items()
    }
    assert lineage.params["truncation"]["sites"] == pytest.approx(lost, rel=1e-3)
    assert min(lost.values()) > 0.1


@pytest.mark.parametrize("rule", [rule for rule in rules() if RULES[rule].cut])
def test_without_a_rank_the_largest_of_the_packs_is_kept(rule: str) -> None:
    """It is the same pack as with that rank, and the share of the energy that is lost is told; a pack of
    weight 0 has no say.
    """
    packs, weights = (
        [made(1, LoRA(r=2, alpha=2)), made(2, LoRA(r=5, alpha=4)), made(3, LoRA(r=9, alpha=9))],
        [0.7, 0.4, 0.0],
    )
    kind = RULES[rule].statistics
    options: dict[str, Any] = {
        "rule": rule,
        "weights": weights,
        "statistics": [measured(pack, kind) for pack in packs] if kind else None,
    }
    with pytest.warns(RankChosen, match="rank=5, was taken.*--rank") as said:
        pack = adapterpack.compose(packs, **options)
    assert pack.id == adapterpack.compose(packs, **options, rank=5).id
    whole, kept = deltas(Ours(rule).pack(packs, weights)), deltas(pack)
    lost = sum(np.sum((whole[path] - kept[path]) ** 2) for path in PATHS) / sum(
        np.sum(whole[path] ** 2) for path in PATHS
    )
    chosen = said[0].message
    assert isinstance(chosen, RankChosen)
    assert chosen.rank == 5
    assert 0 < chosen.energy_lost == pytest.approx(lost, rel=1e-3)
    assert f"{100 * chosen.energy_lost:.1f} %" in str(chosen)


def test_packs_without_a_rank_give_none() -> None:
    """Where no method has a rank of its own, the rank has to be given."""
    scales = {
        site: (IA3(), {"ia3_l": np.full((site.out_features or 0, 1), 1.1, np.float32)}) for site in SITES
    }
    pack = build(
        "scales", method("ia3"), scales, task=PackTask("text-generation"), base=made(1).manifest.base
    )
    with pytest.raises(ConfigError, match="a rank or an energy"):
        adapterpack.compose([pack], rule="ties")


# PEFT.


@pytest.mark.parametrize(
    ("rule", "kind", "params"),
    [
        ("peft_linear", "linear", {}),
        ("peft_ties", "ties", {"density": 0.43}),
        ("peft_ties", "ties", {"density": 0.43, "majority": "frequency"}),
    ],
)
def test_peft_modes_are_pefts_numbers_and_warn(rule: str, kind: str, params: dict[str, Any]) -> None:
    """The same changes as ``add_weighted_adapter``'s, at scales and weights of which all matter."""
    packs = [made(1, LoRA(r=3, alpha=7)), made(2, LoRA(r=3, alpha=1)), made(3)]
    model = loaded(packs)
    options = (
        {"density": 0.43, "majority_sign_method": params.get("majority", "total")} if kind == "ties" else {}
    )
    model.add_weighted_adapter(["p0", "p1", "p2"], WEIGHTS, "merged", combination_type=kind, **options)
    with pytest.warns(UserWarning, match="cross terms"):
        ours = deltas(adapterpack.compose(packs, rule=rule, weights=WEIGHTS, params=params))
    close(ours, changes(model, "merged"))


def test_the_page_of_rules_is_current() -> None:
    """docs/rules.md is what ``make golden`` writes; PEFT's verdicts are measured anew, and those of another
    version may differ.
    """
    written = DOCS.read_text("utf-8")
    assert written.startswith(page(rules().values())), "make golden writes it anew"
    measured = peft_page()
    if f"in PEFT {peft.__version__}" in written:
        assert written.endswith(measured), "make golden writes it anew"


def test_what_peft_gets_wrong() -> None:
    """The faults that the rules are there for: linear is no sum, elementwise modes see the factors, rsLoRA is
    scaled twice.
    """
    assert verdict(LAWS[0], Peft("cat")) == "yes"
    names = {law.__name__: law for law in LAWS}
    for kind, law in (("linear", "sums"), ("linear", "gauge"), ("ties", "gauge"), ("dare_linear", "cancels")):
        assert verdict(names[law], Peft(kind)) == "no"
    assert set(TYPES) >= {"cat", "svd", "ties_svd"}


# What is refused, or said.


def test_wrong_requests_are_refused() -> None:
    """Each says what would do."""
    packs = [made(1), made(2), made(3, LoRA(r=4, alpha=4))]
    for rule, params, error, words, options in (
        ("ties", {"density": 0}, ConfigError, "density", {"rank": 4}),
        ("ties", {"density": "half"}, ConfigError, "expected float", {"rank": 4}),
        ("ties", {"normalize": 1}, ConfigError, "expected bool", {"rank": 4}),
        ("ties", {"scope": "layer"}, ConfigError, "adapter or tensor", {"rank": 4}),
        ("della", {"epsilon": 0.5}, ConfigError, "epsilon", {"rank": 4}),
        ("breadcrumbs", {"gamma": 0.2}, ConfigError, "gamma", {"rank": 4}),
        ("emr", {"task": "pack-9"}, ConfigError, "pack-1 or pack-2", {"rank": 4}),
        ("slerp", {}, Unsupported, "multi_slerp", {}),
        ("nuslerp", {}, Unsupported, "karcher", {}),
        ("nuslerp", {"per": "cell"}, ConfigError, "row or column", {}),
        ("peft_linear", {}, Unsupported, "ranks must be equal", {}),
        ("wudi", {"ridge": 0}, ConfigError, "ridge", {}),
        ("karcher", {"iterations": 0}, ConfigError, "iterations", {}),
        ("lora_lego", {"clusters": -1}, ConfigError, "clusters", {}),
        (
            "ziplora",
            {"steps": 10**9},
            ConfigError,
            "rule ziplora, steps.*expected int <= 10000, found 1000000000",
            {},
        ),
        (
            "lorahub",
            {"evaluations": 10**9},
            ConfigError,
            "rule lorahub, evaluations.*expected int <= 10000",
            {},
        ),
        ("lorahub", {"seed": -1}, ConfigError, "rule lorahub, seed.*expected int >= 0", {}),
        ("karcher", {"iterations": 10**9}, ConfigError, "expected int <= 10000", {}),
        ("lora_lego", {"clusters": 10**9}, ConfigError, "expected int <= 10000", {}),
        ("iso_c", {"mean": "full"}, ConfigError, "support or site", {}),
    ):
        with pytest.raises(error, match=words) as raised:
            adapterpack.compose(packs, rule=rule, params=params, **options)
        assert "To fix it" in str(raised.value)


def test_every_whole_number_of_a_rule_has_bounds() -> None:
    """A stranger's recipe names the parameters, and the time that some rules take is a multiple of a number
    among them.
    """
    for name, rule in RULES.items():
        for parameter in rule.parameters.values():
            if type(parameter.default) is int:
                (bounds,) = getattr(parameter.annotation, "__metadata__", [None])
                assert bounds is not None and bounds.ge <= parameter.default <= bounds.le, (
                    f"{name}: {parameter}"
                )


def test_model_stock_says_that_little_is_left() -> None:
    """Adapters that have nothing in common are orthogonal, and their stock is next to nothing."""
    terms = [
        Term(np.eye(40, dtype=np.float32)[[i]], np.eye(40, dtype=np.float32)[:, [i]], 0.5) for i in range(2)
    ]
    with pytest.warns(UserWarning, match="almost nothing"):
        RULES["model_stock"].prepared([terms], RULES["model_stock"].arguments({}))(terms)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapterpack.compose([made(1, EQUAL), made(2, EQUAL)], rule="model_stock")
