"""Adapters out of checkpoints, and packs of smaller rank: against dense float64 formulas, and back through
the merge.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import adapterpack
from adapterpack import LoRA
from adapterpack.adapter_methods import Site, get
from adapterpack.errors import (
    AdapterpackError,
    BaseMismatch,
    ConfigError,
    NonFinite,
    NothingToDo,
    SiteNotFound,
    Unsupported,
)
from adapterpack.extracting.matrix import extract_matrix
from adapterpack.io import safetensors
from adapterpack.lowrank.range_finder import InMemory, largest
from adapterpack.lowrank.truncation import Cut
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build
from adapterpack.pack.validate.validation import load, validate

pytestmark = pytest.mark.fast

WIDTH, HIDDEN, LAYERS, WORDS = 96, 144, 2, 50
SHAPES = {"q_proj": (WIDTH, WIDTH), "up_proj": (HIDDEN, WIDTH), "down_proj": (WIDTH, HIDDEN)}
TYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def base_tensors(dtype: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """A model of two layers: matrices, a bias, a norm, an embedding and a head."""
    rng = np.random.default_rng(seed)
    tensors = {
        f"model.layers.{i}.{name}.weight": 0.05 * rng.standard_normal(shape)
        for i in range(LAYERS)
        for name, shape in SHAPES.items()
    }
    tensors |= {
        "model.layers.0.q_proj.bias": rng.standard_normal(WIDTH),
        "model.norm.weight": rng.standard_normal(WIDTH),
        "model.embed_tokens.weight": rng.standard_normal((WORDS, WIDTH)),
        "lm_head.weight": rng.standard_normal((WORDS, WIDTH)),
    }
    return {name: value.astype(dtype) for name, value in tensors.items()}


def checkpoint(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir(parents=True)
    safetensors.write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "vocab_size": WORDS,
                "tie_word_embeddings": False,
                **config,
            }
        )
    )
    return folder


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    file = safetensors.SafetensorsFile(folder / "model.safetensors")
    return {name: np.array(file.read(name)) for name in file.tensors}


def lora_on(base: Path, r: int, size: float, seed: int = 1) -> Pack:
    from adapterpack.base.checkpoint import Checkpoint
    from adapterpack.extracting.pipeline import _base

    rng = np.random.default_rng(seed)
    adapters = {}
    for i in range(LAYERS):
        for name, (rows, columns) in SHAPES.items():
            A, B = rng.standard_normal((r, columns)), rng.standard_normal((rows, r))
            params = {"lora_A": A.astype(np.float32), "lora_B": (size / math.sqrt(r) * B).astype(np.float32)}
            adapters[Site(f"model.layers.{i}.{name}", columns, rows)] = (LoRA(r=r, alpha=r), params)
    weights = {site.path: f"{site.path}.weight" for site in adapters}
    return build(
        "tickets",
        get("lora"),
        adapters,
        task=m.PackTask("text-generation"),
        base=_base(Checkpoint(base)),
        weights=weights,
    )


def deltas(pack: Pack) -> dict[str, np.ndarray]:
    return {
        each.site.path: each.config.scale
        * each.params["lora_B"].astype(float)
        @ each.params["lora_A"].astype(float)
        for each in pack.adapters()
    }


def story(pack: Pack) -> Any:
    return pack.manifest.extensions["x_extract"]


# Extract.


@pytest.mark.parametrize("r", [1, 5, 16])
@pytest.mark.parametrize("dtype", sorted(TYPES))
def test_a_merged_lora_comes_back(tmp_path: Path, dtype: str, r: int) -> None:
    """Its rank is found at every site in spite of rounding, the change is that of the adapter, and merged
    again it is the checkpoint.

    The bound: what the factors miss is the rounding of the merge, ulp / sqrt(12) an entry, of which rank r of
    (m, n) takes a part. A second merge rounds again, so an entry is off by an ulp where the sum lies between
    two numbers; and factors in float32 add 1e-6 of the entries of the change, which are about 0.1.
    """
    base = checkpoint(tmp_path / "base", base_tensors(TYPES[dtype]))
    pack = lora_on(base, r, 0.02)
    adapterpack.merge(base, [pack], tmp_path / "tuned")
    found = adapterpack.extract(tmp_path / "tuned", base, out=tmp_path / "back")
    told = story(found)
    assert told["detected"] == dict.fromkeys(deltas(pack), r)
    assert told["ranks"] == told["detected"]
    assert (told["kept_whole"], told["left_out"]) == ([], [])
    eps = float(ml_dtypes.finfo(TYPES[dtype]).eps)
    wanted = deltas(pack)
    for path, delta in deltas(found).items():
        assert np.linalg.norm(delta - wanted[path]) <= 4 * eps * 0.05 * math.sqrt(
            r * sum(delta.shape)
        ) + 2e-6 * np.linalg.norm(delta)
    assert told["truncation"]["total"] <= 1.3 * told["rounding"] + 2e-6
    adapterpack.merge(base, [found], tmp_path / "again")
    before, after = tensors_of(tmp_path / "tuned"), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, value in before.items():
        left, right = value.astype(float), after[name].astype(float)
        np.testing.assert_allclose(left, right, rtol=2 * eps, atol=3 * eps * 0.05 + 1e-7)
    report = validate(tmp_path / "back")
    assert report.valid, report.findings
    assert load(tmp_path / "back").id == found.id
    # the same bytes, whatever the threads do
    assert found.id == adapterpack.extract(tmp_path / "tuned", base, name="back").id


def test_a_change_as_small_as_the_rounding_is_found_too() -> None:
    """An ulp that is as large as the change leaves a part of it, whose rank still stands out."""
    rng = np.random.default_rng(3)
    base = (0.05 * rng.standard_normal((400, 300))).astype(ml_dtypes.bfloat16)
    D = (1.2e-4 / 2 * rng.standard_normal((400, 4)) @ rng.standard_normal((4, 300))).astype(np.float32)
    stored = (base.astype(np.float32) + D).astype(ml_dtypes.bfloat16).astype(np.float32) - base.astype(
        np.float32
    )
    ulps = np.ldexp(1.0, np.frexp(base.astype(np.float64))[1] - 8)
    found = extract_matrix(
        InMemory(stored),
        total=float((stored.astype(float) ** 2).sum()),
        noise=float((ulps**2).sum()) / 12,
        rank=64,
    )
    assert found.detected is not None
    assert 3 <= found.detected <= 6


@pytest.mark.parametrize(("rank", "energy"), [(4, None), (None, 0.8), (6, 0.999)])
def test_a_full_fine_tune_is_cut_where_it_was_asked(
    tmp_path: Path, rank: int | None, energy: float | None
) -> None:
    """A change without an end keeps the energy or the rank; the error is that of the factors as stored,
    within 1 % of the least.
    """
    tensors = base_tensors(np.float32)
    base = checkpoint(tmp_path / "base", tensors)
    rng = np.random.default_rng(2)
    change = {
        name: 0.01
        * np.linalg.qr(rng.standard_normal(value.shape))[0]
        @ np.diag(0.93 ** np.arange(min(value.shape)))
        @ rng.standard_normal((min(value.shape), value.shape[1]))
        for name, value in tensors.items()
        if "proj.weight" in name
    }
    tuned = checkpoint(
        tmp_path / "tuned",
        {name: (value + change.get(name, 0)).astype(np.float32) for name, value in tensors.items()},
    )
    found = adapterpack.extract(tuned, base, rank=rank, energy=energy)
    assert story(found)["detected"] == {}
    for path, delta in deltas(found).items():
        exact = tensors_of(tuned)[f"{path}.weight"].astype(float) - tensors[f"{path}.weight"]
        values = np.linalg.svd(exact, compute_uv=False)
        k = story(found)["ranks"][path]
        shares = np.cumsum(values**2) / np.sum(values**2)
        error = np.linalg.norm(delta - exact) / np.linalg.norm(exact)
        assert story(found)["truncation"]["sites"][path] == pytest.approx(error, rel=1e-4)
        assert error <= 1.01 * math.sqrt(max(0.0, 1 - shares[k - 1])) + 1e-6
        if rank is not None:
            assert k <= rank
        if energy is not None and (rank is None or k < rank):
            assert shares[k - 1] >= energy - 1e-4
            assert k == 1 or shares[k - 2] < energy + 1e-3


def test_what_is_no_matrix_is_kept_left_or_refused(tmp_path: Path) -> None:
    """Norms, embeddings, heads and biases that changed: whole modules in the pack, or listed, or an error
    that names them.
    """
    tensors = base_tensors(np.float32)
    base = checkpoint(tmp_path / "base", tensors)
    merged = adapterpack.merge(base, [lora_on(base, 3, 0.02)], tmp_path / "merged")
    assert merged.tensors_changed == 6
    changed = [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.q_proj.bias",
        "model.norm.weight",
    ]
    merged_tensors = tensors_of(tmp_path / "merged")
    tuned = checkpoint(
        tmp_path / "tuned",
        {name: value + (0.5 if name in changed else 0) for name, value in merged_tensors.items()},
    )
    kept = adapterpack.extract(tuned, base)
    # a module is whole, or factors
    assert story(kept)["kept_whole"] == sorted([*changed, "model.layers.0.q_proj.weight"])
    assert "model.layers.0.q_proj" not in deltas(kept)
    adapterpack.merge(base, [kept], tmp_path / "again")
    for name, value in tensors_of(tmp_path / "again").items():
        np.testing.assert_allclose(value, tensors_of(tuned)[name], atol=1e-6)
    left = adapterpack.extract(tuned, base, rest="leave")
    assert sorted(story(left)["left_out"]) == changed
    assert not left.full()
    assert len(deltas(left)) == 6
    with pytest.raises(Unsupported, match=r"lm_head\.weight.*rest"):
        adapterpack.extract(tuned, base, rest="refuse")
    tied = checkpoint(tmp_path / "tied", tensors_of(tuned), tie_word_embeddings=True)
    with pytest.raises(Unsupported, match="at once"):
        adapterpack.extract(tied, base)


def test_modules_choose_the_layers(tmp_path: Path) -> None:
    """Only the named layers become factors, an embedding among them if it is named; the others follow
    rest.
    """
    base = checkpoint(tmp_path / "base", base_tensors(np.float32))
    adapterpack.merge(base, [lora_on(base, 3, 0.02)], tmp_path / "merged")
    tensors = tensors_of(tmp_path / "merged")
    rng = np.random.default_rng(5)
    added = 0.1 * rng.standard_normal((WORDS, 2)) @ rng.standard_normal((2, WIDTH))
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] + added.astype(np.float32)
    tuned = checkpoint(tmp_path / "tuned", tensors)
    found = adapterpack.extract(tuned, base, modules=["up_proj", "embed_tokens"], rest="leave")
    assert story(found)["detected"] == {
        "model.layers.0.up_proj": 3,
        "model.layers.1.up_proj": 3,
        "model.embed_tokens": 2,
    }
    np.testing.assert_allclose(deltas(found)["model.embed_tokens"].T, added, atol=1e-5)
    adapterpack.merge(base, [found], tmp_path / "again")
    np.testing.assert_allclose(
        tensors_of(tmp_path / "again")["model.embed_tokens.weight"],
        tensors["model.embed_tokens.weight"],
        atol=1e-5,
    )
    with pytest.raises(SiteNotFound, match="q_porj"):
        adapterpack.extract(tuned, base, modules=["q_porj"])


@pytest.mark.parametrize("model_type", ["gpt2", "made-up"])
def test_a_turned_layer_is_taken_as_it_lies(model_type: str, tmp_path: Path) -> None:
    """GPT-2 stores [in, out], which the biases show, also for a square weight: the site says so, and the
    merge puts the change back.
    """
    rng = np.random.default_rng(6)

    def layer(path: str, wide: int) -> dict[str, np.ndarray]:
        shapes = {f"{path}.weight": (80, wide), f"{path}.bias": (wide,)}
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    before = layer("h.0.attn.c_attn", 240) | layer("h.0.attn.c_proj", 80)
    changes = {
        name: (rng.standard_normal((80, 2)) @ rng.standard_normal((2, value.shape[1]))).astype(np.float32)
        for name, value in before.items()
        if name.endswith("weight")
    }
    after = {name: value + changes.get(name, 0) for name, value in before.items()}
    base = checkpoint(tmp_path / "base", before, model_type=model_type)
    tuned = checkpoint(
        tmp_path / "tuned",
        {f"transformer.{name}": value for name, value in after.items()},
        model_type=model_type,
    )
    found = adapterpack.extract(tuned, base)
    assert {(adapter.site.path, adapter.weight, adapter.site.kind) for adapter in found.adapters()} == {
        (f"transformer.{name.removesuffix('.weight')}", name, "transposed") for name in changes
    }
    for name, change in changes.items():
        np.testing.assert_allclose(
            deltas(found)[f"transformer.{name.removesuffix('.weight')}"], change.T, atol=1e-4
        )
    adapterpack.merge(base, [found], tmp_path / "again")
    for name in changes:
        np.testing.assert_allclose(tensors_of(tmp_path / "again")[name], after[name], atol=1e-4)


def test_what_cannot_be_extracted_is_refused(tmp_path: Path) -> None:
    """Equal checkpoints, a cast alone, another model, NaN, wrong options: named errors, and nothing is
    written.
    """
    base = checkpoint(tmp_path / "base", base_tensors(np.float32))
    cast = checkpoint(tmp_path / "cast", base_tensors(ml_dtypes.bfloat16))
    other = checkpoint(tmp_path / "other", {"transformer.w.weight": np.ones((3, 4), np.float32)})
    lost = {"model.layers.1.q_proj.weight": np.full((WIDTH, WIDTH), np.nan, np.float32)}
    broken = checkpoint(tmp_path / "broken", base_tensors(np.float32) | lost)
    cases: list[tuple[Path, dict[str, Any], type[AdapterpackError], str]] = [
        (base, {}, NothingToDo, "base second"),
        (cast, {}, NothingToDo, "rounding"),
        (other, {}, BaseMismatch, "in common"),
        (broken, {}, NonFinite, "q_proj"),
        (base, {"rank": 0}, ConfigError, "rank"),
        (base, {"energy": 2.0}, ConfigError, "energy"),
        (base, {"rest": "drop"}, AdapterpackError, "keep|leave|refuse"),
    ]
    for tuned, options, error, words in cases:
        with pytest.raises(error, match=words):
            adapterpack.extract(tuned, base, out=tmp_path / "never", **options)
    assert not (tmp_path / "never").exists()


def test_a_task_head_that_the_base_lacks_is_kept(
    pack_of: Callable[[str, str], Path], base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """A merged classifier of a real architecture: its head is a new module, its names have a prefix, and it
    merges to the same bytes but for rounding.
    """
    adapterpack.merge(base_of("bert"), [pack_of("bert", "alpha")], tmp_path / "tuned")
    found = adapterpack.extract(tmp_path / "tuned", base_of("bert"), out=tmp_path / "back")
    assert set(story(found)["kept_whole"]) == {"classifier.weight", "classifier.bias"}
    assert set(story(found)["detected"].values()) == {3}
    assert found.manifest.task.labels == ("x", "y", "z")
    adapterpack.merge(base_of("bert"), [found], tmp_path / "again")
    for name, value in tensors_of(tmp_path / "again").items():
        np.testing.assert_allclose(value, tensors_of(tmp_path / "tuned")[name], atol=2e-6)


# Resize.


def made(seed: int = 1, r: int = 12, dtype: Any = np.float32) -> tuple[Pack, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    adapters, exact = {}, {}
    for index, (m_, n) in enumerate([(40, 30), (25, 60), (50, 50)]):
        values = 2.0 ** -np.arange(r) * (1 + 3 * index)
        B = (np.linalg.qr(rng.standard_normal((m_, r)))[0] * values).astype(dtype)
        A = np.linalg.qr(rng.standard_normal((n, r)))[0].T.astype(dtype)
        adapters[Site(f"layers.{index}", n, m_)] = (LoRA(r=r, alpha=2 * r), {"lora_A": A, "lora_B": B})
        exact[f"layers.{index}"] = 2 * B.astype(float) @ A.astype(float)
    return build(
        "tickets", get("lora"), adapters, task=m.PackTask("text-generation"), base=m.Base("acme/base")
    ), exact


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 3},
        {"energy": 0.95},
        {"sv_ratio": 9.0},
        {"sv_cumulative": 0.8},
        {"sv_fro": 0.97},
        {"budget": 0.3},
        {"budget": 700},
        {"rank": 2, "energy": 0.999},
        {"rank": 4, "budget": 0.9},
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_resize(options: dict[str, Any], dtype: Any, tmp_path: Path) -> None:
    """The stated loss is the dense one, at every site and in total, of the tensors as stored; the dtype
    stays; the folder is valid.
    """
    pack, exact = made(dtype=dtype)
    small = adapterpack.resize(pack, out=tmp_path / "small", **options)
    assert validate(tmp_path / "small").valid
    assert small.manifest.lineage is not None
    assert [parent.digest for parent in small.manifest.lineage.parents] == [pack.id]
    params = small.manifest.lineage.params
    found, tails, totals = deltas(small), 0.0, 0.0
    for path, delta in exact.items():
        missed = np.linalg.norm(found.get(path, 0) - delta)
        assert params["truncation"]["sites"][path] == pytest.approx(
            missed / np.linalg.norm(delta), rel=1e-3, abs=2e-6
        )
        tails, totals = tails + missed**2, totals + np.linalg.norm(delta) ** 2
    assert params["truncation"]["total"] == pytest.approx(math.sqrt(tails / totals), rel=1e-3, abs=2e-6)
    assert set(found) | set(params.get("left_out", ())) == set(exact)
    assert {value.dtype for value in small.tensors.values()} == {np.dtype(dtype)}
    numbers = sum(value.size for value in small.tensors.values())
    if "budget" in options:
        now = sum(value.size for value in pack.tensors.values())
        assert numbers <= (options["budget"] * now if options["budget"] < 1 else options["budget"])
    assert all(
        len(value) <= options.get("rank", 99) for name, value in small.tensors.items() if "lora_A" in name
    )


def test_a_budget_beats_one_rank_for_all() -> None:
    """With the numbers that rank 3 everywhere takes, the shared budget leaves a smaller error."""
    pack, _ = made()
    even = adapterpack.resize(pack, rank=3)
    shared = adapterpack.resize(pack, budget=sum(value.size for value in even.tensors.values()))
    errors = [
        each.manifest.lineage.params["truncation"]["total"]
        for each in (even, shared)
        if each.manifest.lineage
    ]
    assert errors[1] < 0.9 * errors[0]


def test_resize_makes_a_lora_of_other_methods() -> None:
    """A VeRA becomes a LoRA with the same change; a LoKr without a low rank is approximated, and the error
    says so.
    """
    rng = np.random.default_rng(4)
    site = Site("layers.0", 24, 20)
    lokr = get("lokr")
    cfg = adapterpack.LoKr(r=8)
    params = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in lokr.shapes(cfg, site).items()
    }
    pack = build(
        "kron", lokr, {site: (cfg, params)}, task=m.PackTask("text-generation"), base=m.Base("acme/base")
    )
    exact = lokr.normal_form(cfg, params, site).down.dense()
    small = adapterpack.resize(pack, rank=3)
    assert small.manifest.lineage is not None
    error = np.linalg.norm(deltas(small)["layers.0"] - exact) / np.linalg.norm(exact)
    assert small.manifest.lineage.params["truncation"]["total"] == pytest.approx(error, rel=1e-3)
    assert error == pytest.approx(
        math.sqrt(largest(InMemory(exact), Cut()).cut(Cut(rank=3))[1].tail) / np.linalg.norm(exact), rel=1e-3
    )


def test_wrong_sizes_are_refused() -> None:
    """Nothing asked for, two criteria, an empty budget: errors that say what to give."""
    pack, _ = made()
    for options, error, words in (
        ({}, ConfigError, "nothing says"),
        ({"energy": 0.9, "sv_fro": 0.9}, ConfigError, "one of them"),
        ({"budget": 10}, NothingToDo, "budget"),
        ({"budget": -1}, ConfigError, "budget"),
        ({"budget": 0.5, "energy": 0.9}, ConfigError, "budget"),
        ({"rank": 0}, ConfigError, "rank"),
    ):
        with pytest.raises(error, match=words):
            adapterpack.resize(pack, **options)  # type: ignore[arg-type]
