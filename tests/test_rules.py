"""Rules of combination: every law over the whole registry, and independent dense formulas in float64 for the rules.

A law is a function of a rule's name that raises where the law is broken. Where a rule says that it keeps a law, the law must hold; where it
says that it does not, the law must be seen to break, so no rule can excuse itself from a law that it keeps.
"""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterpack
from adapterpack.compose.drawn import uniform
from adapterpack.compose.entries import level
from adapterpack.compose.rules import Laws, Rule, get, rules
from adapterpack.compose.space import Term, stack
from adapterpack.errors import AdapterpackError, ConfigError, NothingToDo, Unsupported
from adapterpack.methods import LoRA, Site
from adapterpack.methods import get as method
from adapterpack.pack import manifest as m
from adapterpack.pack.pack import Pack, build
from adapterpack.pack.validate import load, validate

pytestmark = [pytest.mark.fast, pytest.mark.filterwarnings("ignore:peft_")]

SITES = (Site("layers.0.q_proj", 33, 17), Site("layers.0.v_proj", 12, 40))
WHOLE = 17
"""The rank that every change has room in: at this rank nothing is cut."""
EQUAL = LoRA(r=3, alpha=5)
MIXED = (LoRA(r=2, alpha=7), LoRA(r=5, alpha=4, use_rslora=True), LoRA(r=4, alpha=2))
FLOAT32 = 2e-5
"""Of the size of the result: factors in float32, a few decompositions, and changes that partly cancel."""
Deltas = dict[str, np.ndarray]


def made(seed: int, cfg: LoRA = EQUAL, *, turned: bool = False, times: float = 1.0, sites: tuple[Site, ...] = SITES) -> Pack:
    """A pack of random factors that have something in common; ``turned``: the same change in other factors; ``times``: times that."""
    rng, turn, common = np.random.default_rng(seed), np.random.default_rng(seed + 1000), np.random.default_rng(99)
    adapters = {}
    for site in sites:
        A, B = rng.standard_normal((cfg.r, site.in_features)), times * rng.standard_normal((site.out_features, cfg.r))
        A, B = A + common.standard_normal((9, site.in_features))[: cfg.r], B + times * common.standard_normal((site.out_features, 9))[:, : cfg.r]
        if turned:
            Q = turn.standard_normal((cfg.r, cfg.r)) + 2 * np.eye(cfg.r)
            A, B = Q @ A, B @ np.linalg.inv(Q)
        adapters[site] = (cfg, {"lora_A": A.astype(np.float32), "lora_B": B.astype(np.float32)})
    return build(f"pack-{seed}", method("lora"), adapters, task=m.Task("text-generation"),
                 base=m.Base("acme/base", None, "llama", "bfp1:" + "1" * 64, "bfp1:" + "2" * 64))


def deltas(pack: Pack) -> Deltas:
    """The changes of a pack, from its tensors in float64."""
    return {a.site.path: a.config.scale * a.params["lora_B"].astype(np.float64) @ a.params["lora_A"].astype(np.float64) for a in pack.adapters()}


def composed(rule: str, packs: list[Pack], weights: list[float] | None, params: dict[str, Any] | None = None) -> Deltas:
    """The changes of the composed pack, with nothing cut off; zeros where nothing is left."""
    try:
        return deltas(adapterpack.compose(packs, rule=rule, weights=weights, params=params, rank=WHOLE if get(rule).cut else None))
    except NothingToDo:
        return {path: np.zeros_like(delta) for path, delta in deltas(packs[0]).items()}


def close(found: Deltas, wanted: Deltas, size: float = 0.0, tolerance: float = FLOAT32) -> None:
    """Equal at every site, relative to the larger of what is wanted and ``size``."""
    assert found.keys() == wanted.keys()
    for path, delta in wanted.items():
        assert np.linalg.norm(found[path] - delta) <= tolerance * max(np.linalg.norm(delta), size), path


def times(parts: Deltas, factor: float) -> Deltas:
    return {path: factor * delta for path, delta in parts.items()}


def weights_of(rule: str) -> list[float]:
    """Weights of both signs; two for the rules of two, and of one sign where opposite directions leave nothing."""
    return {"slerp": [0.7, 0.4], "nuslerp": [0.7, 0.4], "model_stock": [0.7, 0.4, 1.1]}.get(rule, [0.7, -0.4, 1.1])


def some(rule: str, **options: Any) -> list[Pack]:
    return [made(seed, **options) for seed in range(1, 1 + len(weights_of(rule)))]


# The laws.


def identity(rule: str) -> None:
    """compose([p], [1]) = p."""
    close(composed(rule, [made(1)], [1.0], dict(get(rule).neutral)), deltas(made(1)))


def sums(rule: str) -> None:
    """Under the neutral parameters, density 1 among them: sum w_i D_i."""
    packs, weights = some(rule), weights_of(rule)
    wanted = {path: sum(w * deltas(pack)[path] for w, pack in zip(weights, packs, strict=True)) for path in deltas(packs[0])}
    close(composed(rule, packs, weights, dict(get(rule).neutral)), wanted)


def permutation(rule: str) -> None:
    """The order of the packs changes nothing but rounding."""
    packs, weights = some(rule), weights_of(rule)
    close(composed(rule, packs[::-1], weights[::-1]), composed(rule, packs, weights))


def gauge(rule: str) -> None:
    """B Q^-1, Q A is the same adapter as B, A."""
    packs, weights = some(rule), weights_of(rule)
    close(composed(rule, [made(1, turned=True), *packs[1:]], weights), composed(rule, packs, weights))


def homogeneous(rule: str) -> None:
    """Changes times 1/8 give the result times 1/8: exact in float32, so thresholds fall on the same entries."""
    weights = weights_of(rule)
    close(composed(rule, some(rule, times=0.125), weights), times(composed(rule, some(rule), weights), 0.125))


def weighted(rule: str) -> None:
    """The weight of a lone pack multiplies."""
    close(composed(rule, [made(1)], [0.25]), times(composed(rule, [made(1)], [1.0]), 0.25))


def odd(rule: str) -> None:
    """All weights negated negate the result."""
    packs, weights = some(rule), weights_of(rule)
    close(composed(rule, packs, [-w for w in weights]), times(composed(rule, packs, weights), -1.0))


def cancels(rule: str) -> None:
    """a - a = 0."""
    for seed in (1, 2, 3):
        size = min(np.linalg.norm(delta) for delta in deltas(made(seed)).values())
        close(composed(rule, [made(seed), made(seed)], [1.0, -1.0]), times(deltas(made(seed)), 0.0), size)


def mixed_ranks(rule: str) -> None:
    """Packs of different ranks, alphas and rsLoRA are the same as packs of one rank, with zeros in the place of what is missing."""
    weights = weights_of(rule)
    packs = [made(seed, cfg) for seed, cfg in enumerate(MIXED, 1)][: len(weights)]
    close(composed(rule, packs, weights), composed(rule, [padded(pack) for pack in packs], weights))


def padded(pack: Pack) -> Pack:
    """The same changes as a LoRA of rank 6 and scale 1."""
    adapters = {}
    for a in pack.adapters():
        A, B = a.params["lora_A"], (a.config.scale * a.params["lora_B"]).astype(np.float32)
        more = 6 - len(A)
        params = {"lora_A": np.pad(A, ((0, more), (0, 0))), "lora_B": np.pad(B, ((0, 0), (0, more)))}
        adapters[a.site] = (LoRA(r=6, alpha=6), params)
    return build(pack.name, method("lora"), adapters, task=pack.manifest.task, base=pack.manifest.base)


def zero_weight(rule: str) -> None:
    """A pack of weight 0 is absent: the same tensors to the bit."""
    first, last = made(1), made(2)
    rank = WHOLE if get(rule).cut else None
    with_it = adapterpack.compose([first, made(3), last], rule=rule, weights=[0.7, 0.0, 0.4], rank=rank)
    without = adapterpack.compose([first, last], rule=rule, weights=[0.7, 0.4], rank=rank)
    assert with_it.tensors.keys() == without.tensors.keys()
    assert all(np.array_equal(value, without.tensors[name]) for name, value in with_it.tensors.items())


def other_sites(rule: str) -> None:
    """A pack may lack a site: there the others alone are combined, and a site without any change is not invented."""
    found = composed(rule, [made(1), made(2, sites=SITES[:1])], [0.7, 0.4])
    assert all(np.isfinite(delta).all() for delta in found.values())
    assert found.keys() == {site.path for site in SITES}


def same_bytes(rule: str) -> None:
    """Twice the same pack; and at one site alone what is there among others, unless the rule looks at the whole adapter."""
    packs, weights, rank = some(rule), weights_of(rule), WHOLE if get(rule).cut else None
    whole = adapterpack.compose(packs, rule=rule, weights=weights, rank=rank)
    assert whole.id == adapterpack.compose(packs, rule=rule, weights=weights, rank=rank).id
    params = {"scope": "tensor"} if "scope" in get(rule).parameters else {}
    alone = adapterpack.compose(some(rule, sites=SITES[:1]), rule=rule, weights=weights, params=params, rank=rank)
    among = adapterpack.compose(packs, rule=rule, weights=weights, params=params, rank=rank)
    assert all(np.array_equal(value, among.tensors[name]) for name, value in alone.tensors.items())


def reload(rule: str, tmp_path: Path) -> None:
    """Written, validated and read, it is the same pack, with the rule and its parameters in its lineage."""
    rank = 4 if get(rule).cut else None
    pack = adapterpack.compose(some(rule), rule=rule, weights=weights_of(rule), rank=rank, out=tmp_path / "out")
    assert validate(tmp_path / "out").valid
    again = load(tmp_path / "out")
    assert again.id == pack.id and again.manifest.lineage is not None
    assert again.manifest.lineage.operation == rule
    assert get(rule).parameters.keys() <= again.manifest.lineage.params.keys()


TRAITS: tuple[Callable[[str], None], ...] = (identity, sums, permutation, gauge, homogeneous, weighted, odd, cancels, mixed_ranks)
ALWAYS: tuple[Callable[[str], None], ...] = (zero_weight, other_sites, same_bytes)


def test_every_trait_is_a_law() -> None:
    assert [law.__name__ for law in TRAITS] == list(Laws._fields)


@pytest.mark.parametrize("law", TRAITS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("rule", rules())
def test_law(rule: str, law: Callable[[str], None]) -> None:
    """The law holds where the rule says so, and is broken or refused where it does not."""
    if getattr(get(rule).laws, law.__name__):
        law(rule)
    else:
        with pytest.raises((AssertionError, AdapterpackError)):
            law(rule)


@pytest.mark.parametrize("law", ALWAYS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("rule", rules())
def test_law_of_all(rule: str, law: Callable[[str], None]) -> None:
    """These hold for every rule."""
    law(rule)


@pytest.mark.parametrize("rule", rules())
def test_reload(rule: str, tmp_path: Path) -> None:
    reload(rule, tmp_path)
