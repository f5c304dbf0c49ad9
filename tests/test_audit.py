"""The audit: every figure against an independent dense formula in float64, the verdicts, the page, and the
command.
"""

from __future__ import annotations

import html
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from jsonschema import Draft202012Validator
from notebooks import page_in_notebook
from safetensors.numpy import save_file
from test_report import HOSTILE, Document, assert_harmless

import adapterpack
from adapterpack import LoRA
from adapterpack.adapter_methods import Site, complete, fold, get, resolve_configs
from adapterpack.auditing import scan as entries
from adapterpack.auditing.audit import Audit, audit
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.composing.rules.rule import rules
from adapterpack.errors import BaseMismatch, ConfigError, NothingToDo, Unsupported
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build
from adapterpack.report.audit import audit_report
from adapterpack.resources import schema

SHAPES = {"layers.0.q": (33, 7), "layers.0.v": (12, 41), "layers.1.q": (33, 7), "head": (5, 9)}
FLOAT32 = 3e-5
"""Relative: singular vectors in float32, squared and summed; figures are told to six digits."""
REPORT = Draft202012Validator(schema("report.v1"))
Deltas = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with odd shapes, one tensor of it in bfloat16."""
    folder = tmp_path_factory.mktemp("audit") / "base"
    folder.mkdir()
    rng = np.random.default_rng(9)
    tensors = {
        f"{path}.weight": 0.05 * rng.standard_normal(shape).astype(np.float32)
        for path, shape in SHAPES.items()
    }
    tensors["layers.0.v.weight"] = tensors["layers.0.v.weight"].astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def of_base(folder: Path) -> m.Base:
    known = Checkpoint(folder)
    return m.Base("org/base", None, "llama", known.structure, known.content, probe=known.probe)


def factors(
    seed: int, r: int, shapes: dict[str, tuple[int, int]] = SHAPES, size: float = 0.01
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return {
        path: (
            rng.standard_normal((r, n)).astype(np.float32),
            (size * rng.standard_normal((o, r))).astype(np.float32),
        )
        for path, (o, n) in shapes.items()
    }


def made(
    name: str,
    values: dict[str, tuple[np.ndarray, np.ndarray]],
    origin: m.Base | None = None,
    scale: float = 1.5,
    **rest: Any,
) -> tuple[Pack, Deltas]:
    """A LoRA pack of these factors, and its changes in float64."""
    adapters, deltas = {}, {}
    for path, (A, B) in values.items():
        site = Site(path, A.shape[1], len(B))
        adapters[site] = (LoRA(r=len(A), alpha=scale * len(A)), {"lora_A": A, "lora_B": B})
        deltas[path] = scale * B.astype(np.float64) @ A.astype(np.float64)
    settings = {"task": m.PackTask("text-generation"), "base": origin or m.Base("org/base"), **rest}
    return build(name, get("lora"), adapters, **settings), deltas


def trio(origin: m.Base | None = None) -> list[tuple[Pack, Deltas]]:
    """Three packs: of ranks 3, 3 and 2, the third not everywhere, the second near to the first at one
    site.
    """
    one, two, three = factors(1, 3), factors(2, 3), factors(3, 2)
    two["layers.0.q"] = (
        one["layers.0.q"][0] + 0.3 * two["layers.0.q"][0],
        one["layers.0.q"][1] - 0.2 * two["layers.0.q"][1],
    )
    del three["head"]
    return [made("one", one, origin), made("two", two, origin), made("three", three, origin)]


def dense(deltas: list[Deltas], path: str) -> np.ndarray:
    return np.array([each.get(path, np.zeros(SHAPES[path])) for each in deltas])


def svd(D: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Without what is rounding: a relative 1e-6, far below what random factors have."""
    u, s, vt = np.linalg.svd(D, full_matrices=False)
    kept = s > 1e-6 * s[0] if s.size and s[0] else np.zeros(len(s), bool)
    return u[:, kept], s[kept], vt[kept].T


def close(found: Any, expected: Any, atol: float = 2e-6) -> None:
    """Null and NaN are the same; else within FLOAT32."""
    np.testing.assert_allclose(
        np.array(found, np.float64), np.array(expected, np.float64), rtol=FLOAT32, atol=atol, equal_nan=True
    )


WEIGHTS = (0.7, -0.4, 1.1)


@pytest.fixture(scope="module")
def found(base: Path) -> tuple[dict[str, Any], list[Deltas], Path]:
    packs = trio(of_base(base))
    result = audit(
        [pack for pack, _ in packs], weights=WEIGHTS, base=base, ranks=(5, 1, 3), exact=True
    ).to_json()
    return result, [deltas for _, deltas in packs], base


def figures(result: dict[str, Any], path: str) -> dict[str, Any]:
    return next(site for site in result["sites"] if site["path"] == path)


Found = tuple[dict[str, Any], list[Deltas], Path]
EVERY = pytest.mark.parametrize("path", [*SHAPES, None], ids=[*SHAPES, "total"])


def picked(found: Found, path: str | None) -> tuple[dict[str, Any], list[np.ndarray], list[str]]:
    """The figures of a site, or of all; the changes of each site ``[T, m, n]`` behind them, and the sites."""
    result, deltas, _ = found
    paths = list(SHAPES) if path is None else [path]
    return (
        (result["total"] if path is None else figures(result, path)),
        [dense(deltas, each) for each in paths],
        paths,
    )


@EVERY
def test_norms_cosines_and_what_is_retained(found: Found, path: str | None) -> None:
    """Of all entries, as one long vector a pack."""
    got, changes, _ = picked(found, path)
    flat = np.concatenate([D.reshape(3, -1) for D in changes], axis=1)
    norms = np.linalg.norm(flat, axis=1)
    with np.errstate(invalid="ignore"):
        close(got["norms"], norms)
        close(got["cosine"], flat @ flat.T / np.outer(norms, norms))
        total = np.array(WEIGHTS) @ flat
        close(got["retained"], flat @ total / norms**2)
        close(got["combined"]["norm"], np.linalg.norm(total))


@EVERY
def test_energy_relative_to_the_base(found: Found, path: str | None) -> None:
    """|D_i| / |W|, with W as it lies in the file."""
    got, changes, paths = picked(found, path)
    file = Checkpoint(found[2])
    W = math.sqrt(sum(float((file.read(f"{each}.weight").astype(np.float64) ** 2).sum()) for each in paths))
    close(got["base_norm"], W)
    close(got["relative_norms"], np.sqrt(sum((D**2).sum(axis=(1, 2)) for D in changes)) / W)


@EVERY
def test_principal_angles_and_interference(found: Found, path: str | None) -> None:
    """The mean squared cosine between the singular vectors' subspaces; |(U^T U - I) S (V^T V - I)|_1 over the
    sum of S.
    """
    got, changes, _ = picked(found, path)
    cosines, angles = np.zeros((2, 3, 3)), np.zeros((3, 3))
    interference = nuclear = 0.0
    for D in changes:
        parts = [svd(each) for each in D]
        for i in range(3):
            for j in range(3):
                angles[i, j] += min(len(parts[i][1]), len(parts[j][1]))
                for side, at in enumerate((0, 2)):
                    values = np.linalg.svd(parts[i][at].T @ parts[j][at], compute_uv=False)
                    cosines[side, i, j] += (values**2).sum()
        U, V = (np.concatenate([part[at] for part in parts], axis=1) for at in (0, 2))
        S = np.concatenate([part[1] for part in parts])
        interference += np.abs((U.T @ U - np.eye(len(S))) @ np.diag(S) @ (V.T @ V - np.eye(len(S)))).sum()
        nuclear += S.sum()
    with np.errstate(invalid="ignore"):
        close(got["overlap"]["outputs"], cosines[0] / angles)
        close(got["overlap"]["inputs"], cosines[1] / angles)
    close(got["interference"]["total"], interference)
    close(got["interference"]["relative"], interference / nuclear)


@EVERY
def test_conflicts_of_sign(found: Found, path: str | None) -> None:
    """Counted entry by entry, with the signs of the weights: a negative weight turns a pack around."""
    got, changes, _ = picked(found, path)
    mixed = counted = large = large_mixed = 0
    left = whole = 0.0
    absolute, against = np.zeros((3, 3)), np.zeros((3, 3))
    for D in changes:
        rms = np.sqrt((D**2).mean(axis=(1, 2)))
        for entry in (D * np.sign(WEIGHTS)[:, None, None]).reshape(3, -1).T:
            counted += 1
            mixed += bool((entry > 0).any() and (entry < 0).any())
            big = entry[(np.abs(entry) >= rms) & (entry != 0)]
            large += len(big) > 1
            large_mixed += bool((big > 0).any() and (big < 0).any())
            products = np.outer(entry, entry)
            absolute += np.abs(products)
            against += np.abs(np.minimum(products, 0))
            left += abs(float(np.abs(WEIGHTS) @ entry))
            whole += float(np.abs(WEIGHTS) @ np.abs(entry))
    conflict = got["conflict"]
    close(conflict["share"], mixed / counted)
    close(conflict["large"], large_mixed / large if large else math.nan)
    close(conflict["cancelled"], 1 - left / whole)
    with np.errstate(invalid="ignore"):
        close(conflict["pairs"], against / absolute)


@EVERY
def test_truncation_loss(found: Found, path: str | None) -> None:
    """sqrt of the squared singular values beyond the rank, over all of them, of the weighted sum; ranks
    sorted.
    """
    got, changes, _ = picked(found, path)
    values = [np.linalg.svd(np.tensordot(WEIGHTS, D, 1), compute_uv=False) for D in changes]
    whole = sum((S**2).sum() for S in values)
    assert list(got["truncation"]) == ["1", "3", "5"]
    close(
        list(got["truncation"].values()),
        [math.sqrt(sum((S[rank:] ** 2).sum() for S in values) / whole) for rank in (1, 3, 5)],
    )


@EVERY
@pytest.mark.parametrize(("code", "dtype"), [("BF16", ml_dtypes.bfloat16), ("F16", np.float16)])
def test_fold_loss(found: Found, path: str | None, code: str, dtype: Any) -> None:
    """Error and kept part of round(W + sum w D) - W; the float32 sum before the rounding moves few values by
    one unit (1e-3).
    """
    got, changes, paths = picked(found, path)
    error = inner = energy = 0.0
    for each, D in zip(paths, changes, strict=True):
        W, change = (
            Checkpoint(found[2]).read(f"{each}.weight").astype(np.float64),
            np.tensordot(WEIGHTS, D, 1),
        )
        stored = (W + change).astype(np.float32).astype(dtype).astype(np.float64) - W
        error, inner, energy = (
            error + ((stored - change) ** 2).sum(),
            inner + (stored * change).sum(),
            energy + (change**2).sum(),
        )
    assert got["fold"][code]["relative_error"] == pytest.approx(math.sqrt(error / energy), rel=1e-3)
    assert got["fold"][code]["kept"] == pytest.approx(inner / energy, rel=1e-3)


def test_spectra_and_ranks(found: Found) -> None:
    """Singular values, exp of the entropy, |D|^2 / s1^2, and the fewest with 99 % of the energy; of every
    pack at every site.
    """
    result, deltas, _ = found
    for path in SHAPES:
        for D, got in zip(dense(deltas, path), figures(result, path)["spectra"], strict=True):
            _, S, _ = svd(D)
            close(got["values"], S)
            assert got["rank"] == len(S)
            if len(S):
                p = S / S.sum()
                close(got["effective_rank"], math.exp(-(p * np.log(p)).sum()))
                close(got["stable_rank"], (S**2).sum() / S[0] ** 2)
                assert got["rank_99"] == next(
                    k for k in range(1, 99) if (S[:k] ** 2).sum() >= 0.99 * (S**2).sum()
                )
    assert figures(result, "head")["spectra"][2] == {"rank": 0, "effective_rank": 0, "stable_rank": 0, "rank_99": 0, "energy": 0,
                                                     "values": []}  # fmt: skip


def test_cross_terms() -> None:
    """What (sum sqrt(w s) B)(sum sqrt(w s) A) adds to the sum; nothing is told where ranks differ."""
    one, two = factors(1, 3), factors(2, 3)
    packs = [made("one", one)[0], made("two", two)[0]]
    found = audit(packs, weights=(0.6, -0.3))
    got = found.to_json()
    assert got["verdict"]["summary"] in html.unescape(page_in_notebook(found))
    for path in SHAPES:
        a, b = math.sqrt(0.6 * 1.5), math.sqrt(0.3 * 1.5)
        A, B = (
            (a * one[path][0] - b * two[path][0]).astype(np.float64),
            (a * one[path][1] + b * two[path][1]).astype(np.float64),
        )
        wanted = (
            a**2 * one[path][1].astype(np.float64) @ one[path][0]
            - b**2 * two[path][1].astype(np.float64) @ two[path][0]
        )
        close(figures(got, path)["cross_terms"], np.linalg.norm(B @ A - wanted) / np.linalg.norm(wanted))
    assert audit([packs[0], made("three", factors(3, 2))[0]]).to_json()["total"]["cross_terms"] is None


@pytest.mark.parametrize("name", ["loha", "ia3", "oft", "dora"])
def test_other_methods_by_what_the_fold_makes_of_the_weight(base: Path, name: str) -> None:
    """The norm is that of fold(W) - W, whatever the method, where the change has full rank too (within the
    energy that is kept).
    """
    method = get(name)
    cfg = (
        resolve_configs(method, [method.config()], [Site("layers.0.q", 7, 33)])[0]
        if name != "oft"
        else method.config(block_size=7)
    )
    weight = Checkpoint(base).read("layers.0.q.weight").astype(np.float32)
    site = Site("layers.0.q", 7, 33, weight=weight)
    rng = np.random.default_rng(4)
    params = {
        key: (value + 0.05 * rng.standard_normal(value.shape)).astype(np.float32)
        for key, value in method.init(cfg, site, rng).items()
    }
    pack = build(
        name,
        method,
        {Site("layers.0.q", 7, 33): (cfg, params)},
        task=m.PackTask("text-generation"),
        base=of_base(base),
    )
    folded, _ = fold(method, cfg, complete(method, cfg, params, site), site, weight, None)
    got = audit([pack], base=base).to_json()
    [one] = got["sites"]
    wanted = float(np.linalg.norm(folded.astype(np.float64) - weight))
    assert one["norms"][0] == pytest.approx(wanted, rel=1e-3)
    assert one["relative_norms"][0] == pytest.approx(wanted / np.linalg.norm(weight), rel=1e-3)
    assert got["verdict"]["kind"] == "single"


def test_a_sample_is_the_same_every_time_and_near_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 x 300 entries 60 rows: within five standard errors of a share (5 sqrt(1 / 4 / 18,000), rows
    being nearly independent).
    """
    shapes = {"layers.0.q": (400, 300)}
    packs = [made(str(seed), factors(seed, 16, shapes))[0] for seed in (1, 2)]
    whole = audit(packs, exact=True).to_json()["sites"][0]
    monkeypatch.setattr("adapterpack.auditing.audit.SAMPLE", 60 * 300)
    one, two = (audit(packs).to_json()["sites"][0] for _ in range(2))
    assert one == two
    assert (one["rows_examined"], one["sampled"], whole["sampled"]) == (60, True, False)
    assert one["conflict"] != whole["conflict"]
    assert abs(one["conflict"]["share"] - whole["conflict"]["share"]) < 5 * math.sqrt(0.25 / 18_000)
    assert abs(one["conflict"]["pairs"][0][1] - whole["conflict"]["pairs"][0][1]) < 0.03
    assert list(entries.rows_of("a", 400, 300, 18_000)) != list(entries.rows_of("b", 400, 300, 18_000))


def pair(second: dict[str, tuple[np.ndarray, np.ndarray]]) -> Audit:
    return audit([made("one", factors(1, 4, WIDE))[0], made("two", second)[0]])


WIDE = {f"layers.{layer}.q": (96, 80) for layer in range(3)}


def turned(shift: float, keep: float = 0.0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The first pack's directions, its middle matrix turned: ``keep`` of the change itself, and in its
    subspaces.
    """
    values = {}
    for path, (A, B) in factors(1, 4, WIDE).items():
        M = keep * np.eye(4) + shift * np.roll(np.eye(4), 1, axis=1)
        values[path] = (A, (B @ M).astype(np.float32))
    return values


@pytest.mark.parametrize(("kind", "second"), [
    ("apart", factors(2, 4, WIDE)),
    ("aligned", turned(0.3, 1.0)),
    ("opposite", turned(0.3, -1.0)),
    ("shared", turned(1.0, 0.0)),
    ("conflict", turned(1.0, -0.2)),
])  # fmt: skip
def test_the_verdict_says_what_the_packs_are_to_each_other(
    kind: str, second: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    """One kind for each of the ways, whose rules are registered ones; weights only where the figures tell
    them.
    """
    result = pair(second)
    assert result.verdict.kind == kind, result.to_json()["total"]
    assert set(result.verdict.rules) <= set(rules())
    assert result.verdict.weights == {"apart": (1.0, 1.0), "aligned": (0.5, 0.5)}.get(kind)
    assert result.verdict.summary
    assert all(reason.endswith(".") for reason in result.verdict.reasons)


def test_a_negative_weight_turns_a_verdict_around() -> None:
    """What opposes a pack agrees with its opposite."""
    packs = [made("one", factors(1, 4, WIDE))[0], made("two", turned(0.3, -1.0))[0]]
    assert audit(packs, weights=(0.5, -0.5)).verdict.kind == "aligned"


def test_uneven_packs_and_lossy_folds_are_told(base: Path) -> None:
    """A drowned pack and a change below the rounding of bfloat16, in words."""
    origin = of_base(base)
    text = " ".join(
        audit(
            [made("one", factors(1, 3), origin)[0], made("two", factors(2, 3, size=1e-5), origin)[0]]
        ).verdict.reasons
    )
    assert "the change of one is" in text
    tiny = audit([made("tiny", factors(2, 3, size=1e-6), origin)[0]], base=base)
    assert "Folded into the base in BF16" in " ".join(tiny.verdict.reasons)


def test_heads_and_what_cannot_be_measured_are_listed() -> None:
    """A head is averaged where labels and tensors agree, and refused with the reason where they do not; soft
    prompts have no figures.
    """

    def headed(name: str, seed: int, labels: tuple[str, ...], rows: int = 2) -> Pack:
        head = {"weight": np.random.default_rng(seed).standard_normal((rows, 5)).astype(np.float32)}
        return made(
            name, factors(seed, 2), task=m.PackTask("text-classification", None, labels), full={"score": head}
        )[0]

    one = headed("one", 1, ("no", "yes"))
    [whole] = audit([one, headed("two", 2, ("no", "yes"))]).whole
    assert (whole.path, whole.packs, whole.numbers, whole.refusal) == ("score", ("one", "two"), 10, None)
    other = audit([one, headed("two", 2, ("a", "b"))])
    assert "labels" in str(other.whole[0].refusal)
    assert other.obstacles
    assert other.verdict.summary.startswith("Compose refuses")
    assert "tensors" in str(audit([one, headed("two", 2, ("no", "yes"), 3)]).whole[0].refusal)
    dora = get("dora")
    site = Site("layers.0.q", 7, 33)
    params = {
        "lora_A": np.ones((1, 7), np.float32),
        "lora_B": np.ones((33, 1), np.float32),
        "lora_magnitude_vector": np.ones(33, np.float32),
    }
    needy = build(
        "needy",
        dora,
        {site: (dora.config(r=1), params)},
        task=m.PackTask("text-generation"),
        base=m.Base("org/base"),
    )
    both = audit([made("one", factors(1, 2))[0], needy]).to_json()
    assert [(each["pack"], each["path"]) for each in both["skipped"]] == [("needy", "layers.0.q")]
    assert "give it with --base" in both["skipped"][0]["reason"]
    with pytest.raises(NothingToDo, match="give it with --base"):
        audit([needy])


@pytest.mark.parametrize("first", [0, 1])
def test_packs_of_models_with_and_without_a_head_meet_at_their_sites(first: int) -> None:
    """One calls each layer by a prefix more: the same figures as under one name, and the sum is one pack of
    these sites.
    """
    plain = [made("one", factors(1, 2))[0], made("two", factors(2, 3))[0]]
    prefixed = made("two", {f"bert.{path}": value for path, value in factors(2, 3).items()})[0]
    mixed = [plain[0], prefixed][:: -1 if first else 1]
    expected, found = audit(plain[:: -1 if first else 1]), audit(mixed)
    names = [f"bert.{path}" if first else path for path in SHAPES]
    assert [site.path for site in found.sites] == names
    assert found.total is not None
    assert expected.total is not None
    assert found.total.gram.tolist() == expected.total.gram.tolist()
    assert found.verdict == expected.verdict
    both = adapterpack.compose(mixed, rule="linear")
    assert {group.path.removeprefix("bert.") for group in both.manifest.groups} == {*SHAPES}
    assert len(audit([prefixed, made("three", factors(3, 1, {"other": (4, 5)}))[0]]).sites) == 5


def test_a_rule_that_is_recommended_is_one_that_compose_follows(tiny_llama: Path, tmp_path: Path) -> None:
    """Heads that do not go together, and changes without a low rank: no rule that compose would refuse, and
    its reason is told.
    """

    def headed(name: str, seed: int, rows: int) -> Pack:
        head = {"weight": np.random.default_rng(seed).standard_normal((rows, 5)).astype(np.float32)}
        labels = m.PackTask("text-classification", None, ("no", "yes"))
        return made(name, factors(seed, 2), task=labels, full={"score": head})[0]

    apart = [headed("one", 1, 2), headed("two", 2, 3)]
    result = audit(apart)
    assert (result.verdict.rules, result.verdict.weights) == ((), None)
    with pytest.raises(Unsupported) as caught:
        adapterpack.compose(apart)
    assert str(caught.value) in result.verdict.reasons
    base = Checkpoint(tiny_llama)
    origin = of_base(tiny_llama)
    path = "model.layers.0.self_attn.q_proj"
    rows, columns = base.tensors[f"{path}.weight"].shape
    rng = np.random.default_rng(0)
    turning = [
        build(
            name,
            get("hra"),
            {
                Site(path, columns, rows): (
                    get("hra").config(r=2),
                    {"hra_u": rng.standard_normal((columns, 2)).astype(np.float32)},
                )
            },
            task=m.PackTask("text-generation"),
            base=origin,
        )
        for name in ("one", "two")
    ]
    result = audit(turning, base=tiny_llama)
    with pytest.raises(Unsupported) as caught:
        adapterpack.compose(turning, base=tiny_llama)
    assert any(str(caught.value) in reason for reason in result.verdict.reasons)
    assert "--rank" in str(caught.value)
    for rule in result.verdict.rules:
        adapterpack.compose(turning, rule=rule, base=tiny_llama)
    low = [made("one", factors(1, 4, WIDE))[0], made("two", factors(2, 4, WIDE))[0]]
    assert [adapterpack.compose(low, rule=rule).name for rule in audit(low).verdict.rules]


def test_wrong_arguments_are_refused(base: Path) -> None:
    """No packs, ranks and dtypes that are none, as many weights as packs, one base."""
    one = made("one", factors(1, 2))[0]
    with pytest.raises(NothingToDo):
        audit([])
    for wrong in ({"ranks": (0,)}, {"dtypes": ("int3",)}, {"weights": (1.0, 2.0)}):
        with pytest.raises(ConfigError):
            audit([one], **wrong)  # type: ignore[arg-type]
    with pytest.raises(BaseMismatch):
        audit([made("one", factors(1, 2), m.Base("a", None, "llama", "bfp1:" + "1" * 64))[0],
               made("two", factors(1, 2), m.Base("b", None, "llama", "bfp1:" + "2" * 64))[0]])  # fmt: skip
    with pytest.raises(BaseMismatch):
        audit([made("one", factors(1, 2), m.Base("a", None, "llama", "bfp1:" + "1" * 64))[0]], base=base)


def test_progress_ends_at_all(base: Path) -> None:
    """Growing, and the last is the whole."""
    told: list[tuple[int, int]] = []
    audit(
        [pack for pack, _ in trio(of_base(base))],
        base=base,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == sorted(told)
    assert len(told) == len(SHAPES)
    assert told[-1][0] == told[-1][1]


# --- the page -----------------------------------------------------------------------------------------------


def test_the_page_is_self_contained_and_tells_the_figures(found: Found) -> None:
    """Nothing is loaded from elsewhere; sites tell their figures; one pack alone has a page too."""
    text = audit_report(found[0])
    assert_page(text)
    document = Document(text)
    assert sum(name == "polyline" for name, _ in document.elements) == 3
    cosine = figures(found[0], "layers.0.q")["cosine"][0][1]
    row = next(row for row in text.split("<tr>") if "<td>layers.0.q</td>" in row)
    assert f">{cosine:.2f}</td>" in row
    for part in ("Every pair", "Spectra", "What is lost", "Sites to look at first"):
        assert f"<h2>{part}</h2>" in text
    alone = audit([made("alone", factors(1, 3))[0]]).to_json()
    assert_page(audit_report(alone))
    assert "Every pair" not in audit_report(alone)


def assert_page(text: str) -> None:
    assert_harmless(text)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")


def hostile(value: Any) -> Any:
    """The same figures with every text in them hostile."""
    if isinstance(value, dict):
        return {key: hostile(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [hostile(entry) for entry in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_names_are_shown_and_do_nothing(found: Found) -> None:
    """Names of packs and sites, methods, reasons."""
    text = audit_report({**hostile(found[0]), "dtypes": found[0]["dtypes"]})
    assert_harmless(text)
    assert '<script src="https://evil.example/x.js">alert(1)</script>' in Document(text).text


# --- the command --------------------------------------------------------------------------------------------


def process(*args: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "adapterpack", "audit", *map(str, args)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **options,
    )


@pytest.fixture(scope="module")
def written(base: Path) -> list[Path]:
    folder = base.parent / "packs"
    return [Path(str(pack.write(folder / pack.name).path)) for pack, _ in trio(of_base(base))]


def test_the_command(written: list[Path], base: Path, tmp_path: Path) -> None:
    """--json fits the schema and is the library's answer; the page is written; people get a table and the
    verdict.
    """
    page = tmp_path / "audit.html"
    done = process(*written, "--base", base, "--html", page, "--json", "--rank", 2, "--dtype", "fp16")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    REPORT.validate(value)
    assert value == json.loads(json.dumps({"command": "audit", **audit(written, base=base, ranks=[2], dtypes=["fp16"]).to_json(),
                                           "html": str(page)}))  # fmt: skip
    assert_page(page.read_text("utf-8"))
    assert "audit: " in done.stderr
    text = process(*written, "--weight", 1, "--weight", -1, "--weight", 0.5)
    assert text.returncode == 0, text.stderr
    assert "verdict: " in text.stdout
    assert "layers.0.q" in text.stdout
    alone = process(written[0], "--json")
    REPORT.validate(json.loads(alone.stdout))
    refused = process(*written, "--rank", 0, "--json", "--html", tmp_path / "none.html")
    assert refused.returncode == 1
    REPORT.validate(json.loads(refused.stdout))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.html"]


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """Interrupted once the first figures are told: exit code 130, one sentence, no page and no part of
    one.
    """
    shapes = {f"layers.{layer}.q": (640, 640) for layer in range(400)}
    pack = made("wide", factors(1, 8, shapes))[0].write(tmp_path / "wide")
    out = tmp_path / "out"
    out.mkdir()
    # A shell that runs the tests in the background has its children ignore SIGINT; a user's terminal does
    # not.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from adapterpack.cli.main "
        "import main; main()"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "audit",
        str(pack.path),
        str(pack.path),
        "--exact",
        "--html",
        str(out / "a.html"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    )
    assert running.stderr is not None
    first = running.stderr.readline()
    assert first.startswith("audit: "), first
    running.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, rest = running.communicate(timeout=60)
    assert running.returncode == 130, rest
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert time.monotonic() - started < 60
    assert list(out.iterdir()) == []


def test_it_is_the_public_function() -> None:
    """adapterpack.audit."""
    assert adapterpack.audit is audit
