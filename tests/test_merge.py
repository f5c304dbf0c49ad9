"""Merge: every number against the dense formula in float64, every refusal by its name, every output whole or
absent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from msgspec.structs import replace
from notebooks import page_in_notebook
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import adapterpack
from adapterpack import LoRA
from adapterpack.adapter_methods import (
    Method,
    NormalForm,
    Site,
    SiteConfig,
    Traits,
    fold,
    get,
    register,
    registry,
)
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.errors import (
    AdapterpackError,
    BaseMismatch,
    ConfigError,
    NonFinite,
    NothingToDo,
    OutputExists,
    SiteNotFound,
    StorageError,
    Unsupported,
)
from adapterpack.io import safetensors as st
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build

pytestmark = pytest.mark.fast

# --- subjects: tiny random models, and packs made for them --------------------------------------------------


def save_llama(
    folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, shard: str = "5GB"
) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53,
        hidden_size=24,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=3,
        head_dim=8,
        num_key_value_heads=1,
        max_position_embeddings=32,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value)  # zeros would hide a lost bias
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "base")


def linears(base: Checkpoint) -> dict[str, tuple[int, int]]:
    return {
        name.removesuffix(".weight"): base.tensors[name].shape
        for name in base.tensors
        if name.endswith("_proj.weight")
    }


def lora_pack(
    folder: Path,
    name: str = "one",
    *,
    r: int = 3,
    alpha: float = 5.0,
    seed: int = 1,
    size: float = 0.3,
    zero: bool = False,
    dtype: Any = np.float32,
    sites: dict[str, tuple[int, int]] | None = None,
    **rest: Any,
) -> Pack:
    """A random LoRA pack; ``sites`` maps a path to (out, in)."""
    base, rng = Checkpoint(folder), np.random.default_rng(seed)
    adapters = {}
    for path, (rows, columns) in (sites or linears(base)).items():
        params = {
            "lora_A": rng.normal(0, size, (r, columns)),
            "lora_B": rng.normal(0, 0 if zero else size, (rows, r)),
        }
        adapters[Site(path, columns, rows)] = (
            LoRA(r=r, alpha=alpha),
            {key: value.astype(dtype) for key, value in params.items()},
        )
    given = {
        "task": m.PackTask("text-generation"),
        "base": m.Base("base", structure=base.structure, content=base.content),
        "weights": {site.path: base.weight_name(site.path) for site in adapters},
        **rest,
    }
    return build(name, get("lora"), adapters, **given)


def lone_pack(name: str, site: Site, params: dict[str, np.ndarray]) -> Pack:
    """LoRA of rank and scale 1 at one site, for any base."""
    return build(
        name,
        get("lora"),
        {site: (LoRA(r=1, alpha=1), params)},
        task=m.PackTask("feature-extraction"),
        base=m.Base(),
    )


def delta(pack: Pack, path: str) -> np.ndarray:
    """``(alpha / r) B A`` in float64."""
    cfg = next(pack.config_at(group) for group in pack.manifest.groups if group.path == path)
    params = {name: value.astype(np.float64) for name, value in pack.params(path).items()}
    return cfg.alpha / cfg.r * params["lora_B"] @ params["lora_A"]


def tensors(folder: Path) -> dict[str, np.ndarray]:
    base = Checkpoint(folder)
    return {name: np.array(base.read(name)) for name in base.tensors}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def write_base(folder: Path, values: dict[str, np.ndarray], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    st.write(folder / "model.safetensors", values, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "none"}))
    return folder


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["5GB", "12KB"])
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_equals_the_dense_formula(tmp_path: Path, shard: str, stored: Any) -> None:
    """W' = W + (alpha/r) B A to float32 rounding (values below 2: 1e-6); all other tensors keep their bytes;
    the base keeps all of them.
    """
    base = save_llama(tmp_path / "base", shard=shard)
    pack = lora_pack(base, dtype=stored)
    before = digests(base)
    report = adapterpack.merge(base, [pack], tmp_path / "out")
    old, new = tensors(base), tensors(tmp_path / "out")
    assert list(Checkpoint(tmp_path / "out").tensors) == list(Checkpoint(base).tensors)
    assert (len(list(base.glob("*.safetensors"))) > 3) == (shard == "12KB")
    for name, value in old.items():
        path = name.removesuffix(".weight")
        if path in linears(Checkpoint(base)):
            np.testing.assert_allclose(
                new[name], value.astype(np.float64) + delta(pack, path), atol=1e-6, rtol=0
            )
        else:
            assert new[name].tobytes() == value.tobytes()
    assert digests(base) == before
    assert (report.tensors_changed, report.tensors, report.tensors_added) == (14, len(old), 0)
    assert report.bytes_written == sum(
        path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")
    )
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_equals_peft(llama: Path, tmp_path: Path) -> None:
    """The folder of our pack, loaded and merged by PEFT, gives the same weights (float32, max abs 1e-6)."""
    pack = lora_pack(llama, r=5, alpha=7).write(tmp_path / "pack")
    adapterpack.merge(llama, [tmp_path / "pack"], tmp_path / "out")
    peer = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "pack")
        .merge_and_unload()
        .state_dict()
    )
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert pack.path is not None
    for name, value in ours.items():
        assert (value - peer[name]).abs().max() <= 1e-6, name


@pytest.mark.parametrize("weights", [None, [0.5, -1.25, 2.0]])
def test_several_packs_sum(llama: Path, tmp_path: Path, weights: list[float] | None) -> None:
    """W' = W + sum w_i D_i for mixed ranks and alphas, negative weights included; the order of the packs
    changes rounding only.
    """
    packs = [lora_pack(llama, f"p{r}", r=r, alpha=alpha, seed=r) for r, alpha in ((1, 2), (3, 1), (5, 9))]
    report = adapterpack.merge(llama, packs, tmp_path / "out", weights=weights)
    assert repr(report) == f"<MergeReport of p1, p3, p5, in {tmp_path / 'out'}: 100.0 % of the change kept>"
    page = page_in_notebook(report)
    assert all(loss.tensor in page for loss in report.losses)
    adapterpack.merge(llama, packs[::-1], tmp_path / "reversed", weights=weights and weights[::-1])
    old, new, turned = tensors(llama), tensors(tmp_path / "out"), tensors(tmp_path / "reversed")
    for path in linears(Checkpoint(llama)):
        name = f"{path}.weight"
        exact = old[name] + sum(
            w * delta(pack, path) for w, pack in zip(weights or [1, 1, 1], packs, strict=True)
        )
        np.testing.assert_allclose(new[name], exact, atol=4e-6, rtol=0)  # three changes of size up to 5
        np.testing.assert_allclose(new[name], turned[name], atol=4e-6, rtol=0)


def test_bias_free_site_and_disjoint_packs(llama: Path, tmp_path: Path) -> None:
    """Packs at different sites, weighted apart: each site gets its own pack's change alone."""
    sites = linears(Checkpoint(llama))
    halves = [{p: s for p, s in sites.items() if ("mlp" in p) == mlp} for mlp in (False, True)]
    packs = [lora_pack(llama, f"p{i}", seed=i, sites=half) for i, half in enumerate(halves)]
    adapterpack.merge(llama, packs, tmp_path / "out", weights=[1, -1])
    old, new = tensors(llama), tensors(tmp_path / "out")
    for sign, pack, half in zip((1, -1), packs, halves, strict=True):
        for path in half:
            np.testing.assert_allclose(
                new[f"{path}.weight"], old[f"{path}.weight"] + sign * delta(pack, path), atol=1e-6, rtol=0
            )


@pytest.mark.parametrize(
    ("stored", "bits"), [(ml_dtypes.bfloat16, 8), (np.float16, 11), (ml_dtypes.float8_e4m3fn, 4)]
)
def test_narrow_bases_round_once_to_nearest(tmp_path: Path, stored: Any, bits: int) -> None:
    """|stored - exact| <= half a unit in the last place of the exact value (and the float32 sum's own
    rounding, 2^-22).
    """
    rng = np.random.default_rng(3)
    W = rng.normal(0, 1, (31, 17)).astype(stored)
    base = write_base(tmp_path / "base", {"layer.weight": W, "other": W})
    pack = lora_pack(base, sites={"layer": (31, 17)})
    report = adapterpack.merge(base, [pack], tmp_path / "out")
    new = tensors(tmp_path / "out")
    assert new["layer.weight"].dtype == stored
    exact = W.astype(np.float64) + delta(pack, "layer")
    smallest = 2.0 ** {8: -133, 11: -24, 4: -9}[bits]  # subnormals have a fixed unit
    unit = np.maximum(2.0 ** (np.floor(np.log2(np.abs(exact))) - bits + 1), smallest)
    assert (np.abs(new["layer.weight"].astype(np.float64) - exact) <= unit / 2 + 2.0**-22).all()
    assert new["other"].tobytes() == W.tobytes()
    error = np.linalg.norm(new["layer.weight"].astype(np.float64) - exact) / np.linalg.norm(
        delta(pack, "layer")
    )
    assert report.relative_error == pytest.approx(error, rel=1e-3)


def test_ties_go_to_even_and_rounding_happens_once(tmp_path: Path) -> None:
    """In bfloat16 1 + 2^-8 is a tie and goes to 1; 1 + 2^-7 + 2^-8 goes up to 1 + 2^-6; two changes of 3/8
    unit move a weight together.
    """
    W = np.array([[1.0], [1 + 2**-7], [1.0]]).astype(ml_dtypes.bfloat16)
    base = write_base(tmp_path / "base", {"layer.weight": W})

    def pack(name: str, column: list[float]) -> Pack:
        params = {"lora_A": np.ones((1, 1), np.float32), "lora_B": np.array([column], np.float32).T}
        return lone_pack(name, Site("layer", 1, 3), params)

    adapterpack.merge(
        base, [pack("a", [2**-8, 2**-8, 3 * 2**-10]), pack("b", [0, 0, 3 * 2**-10])], tmp_path / "out"
    )
    assert tensors(tmp_path / "out")["layer.weight"].astype(float).tolist() == [
        [1.0],
        [1 + 2**-6],
        [1 + 2**-7],
    ]


def test_float64_stays_float64(tmp_path: Path) -> None:
    """A float64 base is folded in float64: W' equals the formula to 1e-14."""
    W = np.random.default_rng(0).normal(0, 1, (7, 5))
    base = write_base(tmp_path / "base", {"layer.weight": W})
    pack = lora_pack(base, sites={"layer": (7, 5)}, dtype=np.float64)
    adapterpack.merge(base, [pack], tmp_path / "out")
    np.testing.assert_allclose(
        tensors(tmp_path / "out")["layer.weight"], W + delta(pack, "layer"), atol=1e-14, rtol=0
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_converts_every_floating_tensor(tmp_path: Path, dtype: str) -> None:
    """With ``dtype`` every floating tensor is the rounded float32 result, config says so, and transformers
    loads it in that dtype.
    """
    base = save_llama(tmp_path / "base", dtype=torch.bfloat16)
    pack = lora_pack(base)
    adapterpack.merge(base, [pack], tmp_path / "out", dtype=dtype)
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    wanted = getattr(torch, dtype)
    for name, value in new.items():
        path = name.removesuffix(".weight")
        exact = old[name].double() + (
            torch.from_numpy(delta(pack, path)) if path in linears(Checkpoint(base)) else 0
        )
        assert value.dtype == wanted
        assert ((value.double() - exact).abs() <= torch.finfo(wanted).eps * exact.abs() / 2 + 1e-6).all(), (
            name
        )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == wanted


def test_conversion_keeps_tensors_aligned(tmp_path: Path) -> None:
    """Two float32 before an int64: narrowed to bfloat16 the int64 would lie at 4 modulo 8, so it moves first,
    and readers map it.
    """
    header, places = st.plan([("a", "F32", (2,)), ("ids", "I64", (3,)), ("layer.weight", "F32", (3, 5))])
    W = np.random.default_rng(0).normal(0, 1, (3, 5)).astype(np.float32)
    (tmp_path / "base").mkdir()
    parts = [np.array([1, 2], np.float32), np.arange(3), W]
    (tmp_path / "base" / "model.safetensors").write_bytes(header + b"".join(part.tobytes() for part in parts))
    adapterpack.merge(
        tmp_path / "base",
        [lora_pack(tmp_path / "base", sites={"layer": (3, 5)})],
        tmp_path / "out",
        dtype="bf16",
    )
    out = Checkpoint(tmp_path / "out")
    assert all(info.offset % st.DTYPES[info.dtype].itemsize == 0 for info in out.tensors.values())
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert loaded["ids"].tolist() == [0, 1, 2] and loaded["a"].tolist() == [1, 2]
    assert len(places) == len(loaded)


def test_tied_embeddings_stay_tied_and_untouched(tmp_path: Path) -> None:
    """The one stored embedding keeps its bytes, no head appears, and the loaded model is still tied."""
    base = save_llama(tmp_path / "base", tied=True)
    adapterpack.merge(base, [lora_pack(base)], tmp_path / "out")
    old, new = tensors(base), tensors(tmp_path / "out")
    assert set(old) == set(new) and "lm_head.weight" not in new
    assert new["model.embed_tokens.weight"].tobytes() == old["model.embed_tokens.weight"].tobytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- any method, through its normal form --------------------------------------------------------------------


@dataclass(frozen=True)
class Rescale(SiteConfig):
    """An IA3-like method: y' = s * (W x + b) + t, with t only if ``shifted``."""

    shifted: bool = True


def rescale_shapes(cfg: Rescale, site: Site) -> dict[str, tuple[int, ...]]:
    return {"s": (site.out_features,), **({"t": (site.out_features,)} if cfg.shifted else {})}


@pytest.fixture
def rescale() -> Any:
    method = register(
        Method(
            name="test_rescale",
            summary="",
            paper="",
            config=Rescale,
            traits=Traits(False, True, True, False),
            shapes=rescale_shapes,
            init=lambda cfg, site, rng: {
                name: np.ones(shape, np.float32) for name, shape in rescale_shapes(cfg, site).items()
            },
            normal_form=lambda cfg, params, site: NormalForm(output_scale=params["s"], shift=params.get("t")),
            examples=(Rescale(),),
        )
    )
    yield method
    registry.METHODS._values.pop(method.name)


def rescale_pack(folder: Path, method: Method, suffix: str, shifted: bool, name: str = "rescale") -> Pack:
    base, rng = Checkpoint(folder), np.random.default_rng(5)
    adapters = {}
    for path, (rows, columns) in linears(base).items():
        if path.endswith(suffix):
            site, cfg = Site(path, columns, rows), Rescale(shifted)
            adapters[site] = (
                cfg,
                {
                    key: rng.normal(1, 0.5, shape).astype(np.float32)
                    for key, shape in rescale_shapes(cfg, site).items()
                },
            )
    return build(
        name,
        method,
        adapters,
        task=m.PackTask("text-generation"),
        base=m.Base(structure=base.structure, content=base.content),
    )


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "1KB"])
def test_scale_and_shift_reach_weight_and_bias(
    tmp_path: Path, rescale: Method, shard: str, shifted: bool
) -> None:
    """W' = s W and b' = s b + t, also where weight and bias lie in different shards."""
    base = save_llama(tmp_path / "base", shard=shard)
    pack = rescale_pack(base, rescale, "q_proj", shifted)
    report = adapterpack.merge(base, [pack], tmp_path / "out")
    old, new = tensors(base), tensors(tmp_path / "out")
    changed = set()
    for adapter in pack.adapters():
        path, s, t = (
            adapter.site.path,
            adapter.params["s"].astype(float),
            adapter.params.get("t", np.zeros(1)).astype(float),
        )
        np.testing.assert_allclose(
            new[f"{path}.weight"], s[:, None] * old[f"{path}.weight"], atol=1e-6, rtol=0
        )
        np.testing.assert_allclose(new[f"{path}.bias"], s * old[f"{path}.bias"] + t, atol=1e-6, rtol=0)
        changed |= {f"{path}.weight", f"{path}.bias"}
    assert all(new[name].tobytes() == old[name].tobytes() for name in old.keys() - changed)
    assert report.tensors_changed == len(changed)


def test_an_own_fold_and_an_additive_shift_are_summed(tmp_path: Path, rescale: Method) -> None:
    """An additive method with its own ``fold`` (W' = W + u 1^T, b' = b + t) sums with LoRA under weights,
    bias included.
    """

    def fold(cfg: Any, params: Any, site: Site, weight: Any, bias: Any, rows: slice) -> Any:
        return weight + params["s"][rows][:, None], None if bias is None else bias + params["t"][rows]

    method = register(
        rescale._replace(name="test_plus", traits=Traits(True, True, True, False), overrides={"fold": fold})
    )
    try:
        rng = np.random.default_rng(0)
        values = {
            "layer.weight": rng.normal(0, 1, (9, 5)).astype(np.float32),
            "layer.bias": rng.normal(0, 1, 9).astype(np.float32),
        }
        base = write_base(tmp_path / "base", values)
        params = {"s": rng.normal(0, 1, 9).astype(np.float32), "t": rng.normal(0, 1, 9).astype(np.float32)}
        plus = build(
            "plus",
            method,
            {Site("layer", 5, 9): (Rescale(), params)},
            task=m.PackTask("feature-extraction"),
            base=m.Base(),
        )
        lora = lora_pack(base, sites={"layer": (9, 5)})
        adapterpack.merge(base, [plus, lora], tmp_path / "out", weights=[-0.5, 2])
        new = tensors(tmp_path / "out")
        exact = values["layer.weight"] - 0.5 * params["s"].astype(float)[:, None] + 2 * delta(lora, "layer")
        np.testing.assert_allclose(new["layer.weight"], exact, atol=2e-6, rtol=0)
        np.testing.assert_allclose(
            new["layer.bias"], values["layer.bias"] - 0.5 * params["t"].astype(float), atol=1e-6, rtol=0
        )
    finally:
        registry.METHODS._values.pop("test_plus")


# --- heads --------------------------------------------------------------------------------------------------


def save_bert(folder: Path) -> Path:
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=41,
            hidden_size=18,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=23,
            max_position_embeddings=16,
        )
    ).save_pretrained(folder)
    return folder


def headed_pack(
    folder: Path, name: str = "tickets", labels: tuple[str, ...] | None = ("bad", "fair", "good"), **rest: Any
) -> Pack:
    base, rng = Checkpoint(folder), np.random.default_rng(9)
    adapted = [name for name in base.tensors if name.endswith((".query.weight", ".dense.weight"))]
    sites = {f"bert.{name.removesuffix('.weight')}": base.tensors[name].shape for name in adapted}
    head = {
        "weight": rng.normal(0, 1, (3, 18)).astype(np.float32),
        "bias": rng.normal(0, 1, 3).astype(np.float32),
    }
    given = {
        "task": m.PackTask("text-classification", "BertForSequenceClassification", labels),
        "full": {"classifier": head},
        **rest,
    }
    return lora_pack(folder, name, sites=sites, **given)


@pytest.mark.parametrize("labels", [("bad", "fair", "good"), None])
def test_a_head_joins_an_encoder(tmp_path: Path, labels: tuple[str, ...] | None) -> None:
    """The output is a complete classifier for transformers, nothing missing or unexpected, with the logits of
    base + change + head.
    """
    base = save_bert(tmp_path / "base")
    pack = headed_pack(base, labels=labels)
    report = adapterpack.merge(base, [pack], tmp_path / "out")
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert [*model.config.id2label.values()] == list(labels or ("LABEL_0", "LABEL_1", "LABEL_2"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]
    assert report.tensors_added == 2
    assert set(Checkpoint(tmp_path / "out").tensors) == {*model.state_dict()}
    wanted = BertForSequenceClassification.from_pretrained(base, num_labels=3).eval()
    with torch.no_grad():
        for group in pack.manifest.groups:
            module = wanted.get_submodule(group.path)
            if group.role == "adapter":
                module.weight += torch.from_numpy(delta(pack, group.path)).float()
            else:
                for name, value in pack.params(group.path).items():
                    getattr(module, name).copy_(torch.from_numpy(value))
        ids = torch.randint(0, 41, (2, 7))
        torch.testing.assert_close(model.eval()(ids).logits, wanted(ids).logits, atol=1e-5, rtol=0)


def test_a_head_of_the_base_is_replaced(tmp_path: Path) -> None:
    """A head that the base has already keeps its name and place; the bases's other names stay as they are."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=41,
        hidden_size=18,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=23,
        num_labels=2,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    full = {
        "classifier": {"weight": np.full((3, 18), 0.5, np.float32), "bias": np.arange(3, dtype=np.float32)}
    }
    base = Checkpoint(tmp_path / "base")
    site = "bert.encoder.layer.0.output.dense"
    pack = lora_pack(
        tmp_path / "base",
        sites={site: base.tensors[f"{site}.weight"].shape},
        full=full,
        task=m.PackTask("text-classification", "BertForSequenceClassification", ("a", "b", "c")),
    )
    adapterpack.merge(tmp_path / "base", [pack], tmp_path / "out")
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.classifier.bias.tolist() == [0, 1, 2]
    assert list(Checkpoint(tmp_path / "out").tensors) == list(base.tensors)


def test_a_head_joins_a_sharded_decoder(tmp_path: Path) -> None:
    """``score`` goes to the last shard and into the index; the decoder's names need no prefix."""
    base = save_llama(tmp_path / "base", tied=True, shard="12KB")
    full = {"score": {"weight": np.random.default_rng(0).normal(0, 1, (2, 24)).astype(np.float32)}}
    pack = lora_pack(
        base,
        full=full,
        task=m.PackTask("text-classification", "LlamaForSequenceClassification", ("no", "yes")),
    )
    adapterpack.merge(base, [pack], tmp_path / "out")
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert np.array_equal(model.score.weight.detach().numpy(), full["score"]["weight"])


def test_a_trained_output_head_unties_the_embeddings(tmp_path: Path) -> None:
    """A whole ``lm_head`` on a tied base: the output is untied, so that transformers loads the trained head
    and the old embedding.
    """
    base = save_llama(tmp_path / "base", tied=True)
    head = np.random.default_rng(0).normal(0, 1, (53, 24)).astype(np.float32)
    adapterpack.merge(base, [lora_pack(base, full={"lm_head": {"weight": head}})], tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert np.array_equal(model.lm_head.weight.detach().numpy(), head)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert np.array_equal(
        model.model.embed_tokens.weight.detach().numpy(), tensors(base)["model.embed_tokens.weight"]
    )


def test_token_classification_head(tmp_path: Path) -> None:
    """Another task model of the same encoder: its trained head loads, and nothing is missing."""
    base = save_bert(tmp_path / "base")
    pack = headed_pack(
        base, task=m.PackTask("token-classification", "BertForTokenClassification", ("O", "B", "I"))
    )
    adapterpack.merge(base, [pack], tmp_path / "out")
    model, info = AutoModelForTokenClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert np.array_equal(model.classifier.bias.detach().numpy(), pack.params("classifier")["bias"])


# --- refusals, before any output ----------------------------------------------------------------------------


def other_base(folder: Path, **keys: Any) -> m.Base:
    return replace(m.Base("elsewhere", structure=Checkpoint(folder).structure), **keys)


LORA_SITE = "model.layers.0.self_attn.q_proj"
REFUSALS: dict[str, tuple[type[AdapterpackError], str, Any]] = {
    "no packs": (NothingToDo, "no packs", lambda b: {"packs": []}),
    "fresh adapter": (NothingToDo, "change nothing", lambda b: {"packs": [lora_pack(b, zero=True)]}),
    "weight zero": (NothingToDo, "change nothing", lambda b: {"packs": [lora_pack(b)], "weights": [0]}),
    "weights too few": (
        ConfigError,
        "expected 2, found 1",
        lambda b: {"packs": [lora_pack(b), lora_pack(b)], "weights": [1]},
    ),
    "weight not finite": (
        ConfigError,
        "finite",
        lambda b: {"packs": [lora_pack(b)], "weights": [float("nan")]},
    ),
    "unknown dtype": (
        ConfigError,
        "did you mean 'bfloat16'",
        lambda b: {"packs": [lora_pack(b)], "dtype": "bfloat61"},
    ),
    "other structure": (
        BaseMismatch,
        "elsewhere",
        lambda b: {"packs": [lora_pack(b, base=other_base(b, structure=f"bfp1:{'0' * 64}"))]},
    ),
    "other content": (
        BaseMismatch,
        "other weights",
        lambda b: {"packs": [lora_pack(b, base=other_base(b, content=f"bfp1:{'0' * 64}"))]},
    ),
    "no such site": (
        SiteNotFound,
        "did you mean",
        lambda b: {"packs": [lora_pack(b, sites={f"{LORA_SITE}x": (24, 24)})]},
    ),
    "other shape": (
        BaseMismatch,
        r"\(23, 24\)",
        lambda b: {"packs": [lora_pack(b, sites={LORA_SITE: (23, 24)})]},
    ),
    "two heads": (
        Unsupported,
        "trained whole",
        lambda b: {
            "packs": [
                lora_pack(b, name, full={"lm_head": {"weight": np.ones((53, 24), np.float32)}})
                for name in "ab"
            ]
        },
    ),
    "head and adapter": (
        Unsupported,
        "only one of the two",
        lambda b: {
            "packs": [
                lora_pack(b, "a", sites={"lm_head": (53, 24)}),
                lora_pack(b, "b", full={"lm_head": {"weight": np.ones((53, 24), np.float32)}}),
            ]
        },
    ),
    "head of another shape": (
        Unsupported,
        r"\(52, 24\)",
        lambda b: {"packs": [lora_pack(b, full={"lm_head": {"weight": np.ones((52, 24), np.float32)}})]},
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses(llama: Path, tmp_path: Path, case: str) -> None:
    """Every refusal has its own class, says what to look at, and leaves nothing behind, hidden files
    included.
    """
    error, words, arguments = REFUSALS[case]
    given = arguments(llama)
    with pytest.raises(error, match=words):
        adapterpack.merge(llama, given.pop("packs"), tmp_path / "out", **given)
    assert [*tmp_path.iterdir()] == []


def test_refuses_what_is_not_additive(llama: Path, tmp_path: Path, rescale: Method) -> None:
    """A method that multiplies takes no weight, and no bias where the base has none; what is no change of
    weights is not folded.
    """
    pack, biasing = (
        rescale_pack(llama, rescale, "q_proj", True),
        rescale_pack(llama, rescale, "gate_proj", True),
    )
    for packs, weights, words in (
        ([pack], [0.5], "not additive"),
        ([biasing], None, "gives this site a bias, and the base has none"),
    ):
        with pytest.raises(Unsupported, match=words):
            adapterpack.merge(llama, packs, tmp_path / "out", weights=weights)
    registry.METHODS._values[rescale.name] = rescale._replace(kind="prompt")
    with pytest.raises(Unsupported, match="not act on weights"):
        adapterpack.merge(llama, [pack], tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("first", ["rescale", "lora"])
def test_adapters_that_do_not_add_up_fold_in_order(
    llama: Path, tmp_path: Path, rescale: Method, first: str, by_rows: bool
) -> None:
    """One after the other, as active adapters apply in a model: scale and then add, or add and then scale, by
    blocks of rows or whole.
    """
    registry.METHODS._values[rescale.name] = rescale._replace(
        traits=dataclasses.replace(rescale.traits, row_separable=by_rows)
    )
    scaling, adding = rescale_pack(llama, rescale, "q_proj", True), lora_pack(llama)
    packs = [scaling, adding] if first == "rescale" else [adding, scaling]
    adapterpack.merge(llama, packs, tmp_path / "out")
    before, after = Checkpoint(llama), Checkpoint(tmp_path / "out")
    changed = 0
    for path in (group.path for group in scaling.manifest.groups):
        name = before.require_weight(path)
        expected = before.read(name).astype(np.float64)
        for pack in packs:
            for adapter in pack.adapters():
                if adapter.site.path == path:
                    expected, _ = fold(
                        pack.method,
                        adapter.config,
                        {k: v.astype(np.float64) for k, v in adapter.params.items()},
                        adapter.site,
                        expected,
                        np.zeros(len(expected)),
                    )
        # float32 rounds each of a handful of steps on numbers of size 1
        np.testing.assert_allclose(after.read(name), expected, rtol=1e-5, atol=1e-6)
        changed += 1
    assert changed


def test_refuses_bases_that_would_come_out_wrong(llama: Path, tmp_path: Path) -> None:
    """A quantized base, a weight that two modules share, and integer weights are refused with the way out."""
    quantized = shutil.copytree(llama, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "fp8"}})
    )
    tied = save_llama(tmp_path / "tied", tied=True)
    shared = lora_pack(tied, sites={"lm_head": (53, 24)}, weights={"lm_head": "model.embed_tokens.weight"})
    embedding = lora_pack(tied, full={"model.embed_tokens": {"weight": np.ones((53, 24), np.float32)}})
    integers = write_base(tmp_path / "integers", {"layer.weight": np.ones((3, 4), np.int8)})
    rounded = lora_pack(integers, sites={"layer": (3, 4)})
    for base, pack, words in (
        (quantized, lora_pack(llama), "quantized"),
        (tied, shared, "only the head was adapted"),
        (tied, embedding, "only one of them"),
        (integers, rounded, "floating point"),
    ):
        with pytest.raises(Unsupported, match=words):
            adapterpack.merge(base, [pack], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_output_paths(llama: Path, tmp_path: Path) -> None:
    """An existing output is kept as it is; an output inside an input is refused."""
    (tmp_path / "out").mkdir()
    pack = lora_pack(llama).write(tmp_path / "pack")
    with pytest.raises(OutputExists):
        adapterpack.merge(llama, [pack], tmp_path / "out")
    for inside in (llama / "out", tmp_path / "pack" / "out"):
        with pytest.raises(ConfigError, match="inside an input"):
            adapterpack.merge(llama, [pack], inside)
        assert not inside.exists()
    assert [*(tmp_path / "out").iterdir()] == []
    with pytest.raises(ConfigError, match=r"a merged checkpoint is a folder.*\.gguf.*give one as BASE"):
        adapterpack.merge(llama, [pack], tmp_path / "out.gguf")


def test_safe_refuses_overflow_and_names_the_tensor(tmp_path: Path) -> None:
    """65504 + 100 overflows float16: written as infinity by default and said so, refused under ``safe``."""
    base = write_base(
        tmp_path / "base",
        {"layer.weight": np.full((3, 4), 65504, np.float16), "other": np.ones(2, np.float16)},
    )
    pack = lora_pack(base, sites={"layer": (3, 4)}, r=1, alpha=1, size=100)
    with pytest.raises(NonFinite, match=r"layer\.weight"):
        adapterpack.merge(base, [pack], tmp_path / "out", safe=True)
    assert not (tmp_path / "out").exists()
    report = adapterpack.merge(base, [pack], tmp_path / "out")
    assert np.isinf(tensors(tmp_path / "out")["layer.weight"]).any()
    assert report.advice is not None and "layer.weight" in report.advice
    json.dumps(report.to_json(), allow_nan=False)
    adapterpack.merge(base, [pack], tmp_path / "wide", safe=True, dtype="float32")
    big = write_base(
        tmp_path / "big", {"layer.weight": np.ones((3, 4), np.float32), "other": np.full(2, 1e6, np.float32)}
    )
    with pytest.raises(NonFinite, match="other"):
        adapterpack.merge(
            big, [lora_pack(big, sites={"layer": (3, 4)})], tmp_path / "out2", safe=True, dtype="float16"
        )


# --- the report ---------------------------------------------------------------------------------------------


def test_fold_loss_and_advice(tmp_path: Path) -> None:
    """A change of 1e-3 of the weights in bfloat16 is stored with an error of about 0.8, half kept; in float32
    with next to none.

    The expected values are computed here in float64 from the stored tensors.
    """
    rng = np.random.default_rng(0)
    W = rng.normal(0, 0.02, (640, 512)).astype(ml_dtypes.bfloat16)
    base = write_base(tmp_path / "base", {"layer.weight": W})
    pack = lora_pack(base, sites={"layer": (640, 512)}, r=16, alpha=16, size=(2e-5 / 4) ** 0.5)
    report = adapterpack.merge(base, [pack], tmp_path / "out")
    D = delta(pack, "layer")
    S = tensors(tmp_path / "out")["layer.weight"].astype(np.float64) - W.astype(np.float64)
    assert report.relative_error == pytest.approx(np.linalg.norm(S - D) / np.linalg.norm(D), rel=1e-4)
    assert report.kept == pytest.approx((S * D).sum() / (D * D).sum(), rel=1e-4)
    assert 0.6 < report.relative_error < 1
    assert report.advice is not None and "float32" in report.advice and "BF16" in report.advice
    wide = adapterpack.merge(base, [pack], tmp_path / "wide", dtype="float32")
    assert wide.relative_error < 1e-3 and wide.kept == pytest.approx(1, abs=1e-5) and wide.advice is None
    assert (
        json.loads((tmp_path / "out" / "adapterpack.merge.json").read_text())["fold_loss"]["relative_error"]
        == report.relative_error
    )
    assert report.worst()[0].tensor == "layer.weight"


def test_a_change_that_rounding_swallows_whole_is_no_merge(tmp_path: Path) -> None:
    """1 + 2^-12 is 1 in bfloat16: the output would be the base, so it is refused and vanishes."""
    base = write_base(tmp_path / "base", {"layer.weight": np.ones((3, 4), ml_dtypes.bfloat16)})
    params = {"lora_A": np.full((1, 4), 2**-12, np.float32), "lora_B": np.ones((3, 1), np.float32)}
    pack = lone_pack("faint", Site("layer", 4, 3), params)
    with pytest.raises(NothingToDo, match="float32"):
        adapterpack.merge(base, [pack], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_equal_inputs_give_equal_bytes_and_provenance(llama: Path, tmp_path: Path) -> None:
    """Two merges give the same bytes in every file; the side file and the metadata name base and packs by
    digest.
    """
    packs = [lora_pack(llama, "a"), lora_pack(llama, "b", seed=2)]
    for out in ("x", "y"):
        adapterpack.merge(llama, packs, tmp_path / out, weights=[1, 0.5])
    assert digests(tmp_path / "x") == digests(tmp_path / "y")
    note = json.loads((tmp_path / "x" / "adapterpack.merge.json").read_text())
    base = Checkpoint(llama)
    assert note["base"] == {
        "name": base.name,
        "structure": base.structure,
        "probe": base.probe,
        "content": base.content,
    }
    assert note["packs"] == [
        {"name": p.name, "id": p.id, "weight": w, "base": "same"}
        for p, w in zip(packs, (1, 0.5), strict=True)
    ]
    metadata = st.SafetensorsFile(tmp_path / "x" / "model.safetensors").metadata
    assert metadata["format"] == "pt" and packs[1].id in metadata["adapterpack_merge"]
    assert (tmp_path / "x" / "config.json").read_bytes() == (llama / "config.json").read_bytes()


def test_progress_counts_every_byte(llama: Path, tmp_path: Path) -> None:
    """``progress`` rises from call to call and ends at the bytes written."""
    calls: list[tuple[int, int]] = []
    report = adapterpack.merge(
        llama, [lora_pack(llama)], tmp_path / "out", progress=lambda done, total: calls.append((done, total))
    )
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1] == (report.bytes_written, report.bytes_written)


def test_an_error_in_progress_stops_the_merge(llama: Path, tmp_path: Path) -> None:
    """What the progress function raises comes out, it is not called again, and no output is left."""
    raised: list[int] = []
    late: list[int] = []

    def stop(done: int, total: int) -> None:
        (late if raised else []).append(done)
        if done > total / 2:
            raised.append(done)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapterpack.merge(llama, [lora_pack(llama)], tmp_path / "out", progress=stop)
    assert [*tmp_path.iterdir()] == []
    assert len(raised) == 1 and late == []


# --- memory, disk, sudden death -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    values = {f"{i}.x_proj.weight": rng.standard_normal((1536, 4096), np.float32) for i in range(3)}
    return write_base(tmp_path_factory.mktemp("large") / "base", values)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_memory_stays_below_one_tensor(large: Path, tmp_path: Path, dtype: str | None) -> None:
    """Folding three tensors of 24 MiB allocates less than one of them at any time."""
    pack = lora_pack(large)
    assert Checkpoint(large).content
    tracemalloc.start()
    try:
        adapterpack.merge(large, [pack], tmp_path / "out", dtype=dtype)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1536 * 4096 * 4


CHILD = """
import resource, sys, time
import adapterpack
def slow(done, total):
    print(done, total, flush=True)
    if {stop} and 3 * done > total:
        time.sleep(600)
if {limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    adapterpack.merge(sys.argv[1], [sys.argv[2]], sys.argv[3], progress=slow)
except adapterpack.AdapterpackError as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
"""


@pytest.mark.parametrize("limit", [1 << 16, 30 << 20])
def test_a_full_disk_leaves_nothing(large: Path, tmp_path: Path, limit: int) -> None:
    """A write that the system refuses, at once or in the middle, is a StorageError that names the output, and
    nothing is left.
    """
    lora_pack(large).write(tmp_path / "pack")
    code = CHILD.format(stop=0, limit=limit)
    command = [sys.executable, "-c", code, large, tmp_path / "pack", tmp_path / "out"]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 1
    assert (
        "StorageError" in child.stderr
        and str(tmp_path / "out") in child.stderr
        and "ulimit -f" in child.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_too_little_space_is_seen_before_anything_is_written(tmp_path: Path) -> None:
    """A base (sparse, so it costs nothing) larger than the free space is refused with both numbers, before
    its bytes are read.
    """
    size = shutil.disk_usage(tmp_path).free + (1 << 30)
    header, _ = st.plan([("layer.weight", "F32", (3, 4)), ("filler", "U8", (size,))])
    (tmp_path / "base").mkdir()
    with (tmp_path / "base" / "model.safetensors").open("wb") as file:
        file.write(header)
        file.write(np.ones((3, 4), np.float32).tobytes())
        file.truncate(len(header) + 48 + size)
    params = {"lora_A": np.ones((1, 4), np.float32), "lora_B": np.ones((3, 1), np.float32)}
    pack = lone_pack("p", Site("layer", 4, 3), params)
    with pytest.raises(StorageError, match="not enough space"):
        adapterpack.merge(tmp_path / "base", [pack], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_kill_9_leaves_no_output(large: Path, tmp_path: Path) -> None:
    """A merge that dies in the middle leaves no ``out``, and the next one succeeds under the same name."""
    pack = lora_pack(large).write(tmp_path / "pack")
    code = CHILD.format(stop=1, limit=0)
    child = subprocess.Popen(
        [sys.executable, "-c", code, large, tmp_path / "pack", tmp_path / "out"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    done, total = 0, 1
    while 3 * done <= total:
        done, total = map(int, child.stdout.readline().split())
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert done < total
    assert not (tmp_path / "out").exists()
    adapterpack.merge(large, [pack], tmp_path / "out")
    assert len(Checkpoint(tmp_path / "out").tensors) == 3


def test_no_torch(large: Path, tmp_path: Path) -> None:
    """A merge imports neither torch nor transformers, and into a plain checkpoint nothing that quantized
    ones, GGUF and graphs need.
    """
    lora_pack(large).write(tmp_path / "pack")
    code = """import sys, adapterpack
adapterpack.merge(sys.argv[1], [sys.argv[2]], sys.argv[3])
print({"torch", "transformers", "onnx_ir", "adapterpack.bundle.manifest", "adapterpack.base.gguf.header",
       "adapterpack.merging.gguf.base_model",
       *(f"adapterpack.base.codecs.{file}" for file in ("awq", "bitsandbytes", "bnb4", "compressed", "fp8", "gptq", "torchao"))}
      & set(sys.modules))"""
    command = [sys.executable, "-c", code, large, tmp_path / "pack", tmp_path / "out"]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "set()"
