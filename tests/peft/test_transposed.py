"""PEFT's adapters of transposed layers (transformers' ``Conv1D``): merge == attach == PEFT's own forward in
float64.

PEFT's folder does not say which layers are transposed: one flag stands for all, and HiRA has none. What
attaches an adapter looks at the model; what only has a checkpoint has to find out from it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import peft
import pytest
import torch
from noise import shake
from transformers import GPT2Config, GPT2LMHeadModel, GPTBigCodeConfig, GPTBigCodeForCausalLM
from transformers.pytorch_utils import Conv1D

import adapterpack
from adapterpack import attach, audit, compose, convert, export, load, merge
from adapterpack.adapter_methods import PeftLayer, methods
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.errors import Unsupported
from adapterpack.io import safetensors
from adapterpack.pack.layer_kinds import match_layers

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(0, 31, (2, 6), generator=torch.Generator().manual_seed(7))
CLOSE = 1e-5
"""Of the change."""
SQUARE, EVERY = ["attn.c_proj"], ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
LAYERS = [f"transformer.h.{layer}.{leaf}" for layer in (0, 1) for leaf in EVERY]

THEIRS: dict[str, tuple[str, Callable[..., Any]]] = {
    "lora": ("lora", lambda **told: peft.LoraConfig(r=3, **told)),
    "lora over root r": ("lora", lambda **told: peft.LoraConfig(r=3, use_rslora=True, **told)),
    "dora": ("dora", lambda **told: peft.LoraConfig(r=3, use_dora=True, **told)),
    "mica": ("lora", lambda **told: peft.LoraConfig(r=3, init_lora_weights="mica", **told)),
    "adalora": ("adalora", lambda **told: peft.AdaLoraConfig(init_r=3, total_step=9, **told)),
    "ia3": (
        "ia3",
        lambda **told: peft.IA3Config(
            feedforward_modules=["mlp.c_proj"] if told["target_modules"] == EVERY else [], **told
        ),
    ),
    "vera": ("vera", lambda **told: peft.VeraConfig(r=3, **told)),
    "vera by its seed": ("vera", lambda **told: peft.VeraConfig(r=3, save_projection=False, **told)),
    "fourierft": ("fourierft", lambda **told: peft.FourierFTConfig(n_frequency=20, **told)),
    "waveft": ("waveft", lambda **told: peft.WaveFTConfig(n_frequency=20, **told)),
    "deft": ("deft", lambda **told: peft.DeftConfig(r=3, **told)),
    "para": ("para", lambda **told: peft.DeftConfig(r=3, para=True, **told)),
    "lora_bias": ("lora_bias", lambda **told: peft.LoraConfig(r=3, lora_bias=True, **told)),
    "biased_lora": ("biased_lora", lambda **told: peft.LoraConfig(r=3, bias="lora_only", **told)),
    "pvera": ("pvera", lambda **told: peft.PveraConfig(r=3, **told)),
    "frod": ("frod", lambda **told: peft.FrodConfig(sparse_rate=0.1, progressbar=False, **told)),
    "gralora": ("gralora", lambda **told: peft.GraloraConfig(r=4, hybrid_r=2, **told)),
    "vblora": ("vblora", lambda **told: peft.VBLoRAConfig(r=3, num_vectors=9, vector_length=8, **told)),
    "vblora's best vectors": (
        "vblora",
        lambda **told: peft.VBLoRAConfig(
            r=3, num_vectors=9, vector_length=8, save_only_topk_weights=True, **told
        ),
    ),
    "tinylora": ("tinylora", lambda **told: peft.TinyLoraConfig(r=2, u=5, **told)),
    "hira": ("hira", lambda **told: peft.HiraConfig(r=3, **told)),
    "randlora": ("randlora", lambda **told: peft.RandLoraConfig(r=3, **told)),
    "randlora by its seed": (
        "randlora",
        lambda **told: peft.RandLoraConfig(r=3, save_projection=False, **told),
    ),
    "unilora": (
        "unilora",
        lambda **told: peft.UniLoraConfig(r=2, theta_d_length=30, save_indices=True, **told),
    ),
}
"""Every method that PEFT has for transposed layers and that this package reads."""


@cache
def _gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=31,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_inner=24,
            n_positions=16,
            bos_token_id=1,
            eos_token_id=2,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    ).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return model


def gpt2() -> Any:
    """A random GPT-2 whose attention output is square, with its biases."""
    return copy.deepcopy(_gpt2())


@torch.no_grad()
def outputs(model: Any, dtype: torch.dtype = torch.float64) -> np.ndarray:
    """The logits, or the hidden states, computed in that dtype."""
    found: np.ndarray = model.eval().to(dtype)(input_ids=IDS)[0].double().numpy()
    return found


def written(config: Any, folder: Path, model: Any) -> np.ndarray:
    """What PEFT gives in float64 with a trained adapter, which lies in ``folder`` then."""
    theirs = peft.get_peft_model(model, config)
    shake(theirs, 0.3, 3)
    theirs.save_pretrained(folder)
    return outputs(theirs)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a checkpoint."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    gpt2().save_pretrained(folder)
    return folder


def test_every_such_method_is_here() -> None:
    """A method that gets a PEFT form for transposed layers is tested here, too; what acts at some positions
    only cannot be merged.
    """
    known = {
        method.name
        for method in methods().values()
        if method.peft is not None
        and "transposed" in method.peft.layers
        and method.peft.layers["transposed"].ambiguous_because is PeftLayer().ambiguous_because
    }
    assert known == {"alora", *(method for method, _ in THEIRS.values())}


def test_an_activated_lora(base: Path, tmp_path: Path) -> None:
    """From its invocation on, in the one row that has it: attached, and by PEFT from the pack; a merge is
    refused.
    """
    config = peft.LoraConfig(
        r=3, target_modules=EVERY, task_type="CAUSAL_LM", alora_invocation_tokens=[int(IDS[0, 2])]
    )
    theirs = written(config, tmp_path / "theirs", gpt2())
    plain = outputs(gpt2())
    assert np.abs((theirs - plain)[0, 2:]).max() > 0.02
    assert np.abs((theirs - plain)[0, :2]).max() == 0
    pack = load(tmp_path / "theirs")
    assert np.abs(outputs(attach(gpt2(), pack), torch.float32) - theirs).max() < CLOSE * np.abs(theirs).max()
    convert(tmp_path / "theirs", tmp_path / "pack", to="pack", base=base)
    assert (
        np.abs(outputs(peft.PeftModel.from_pretrained(gpt2(), tmp_path / "pack")) - theirs).max()
        < CLOSE * np.abs(theirs).max()
    )
    with pytest.raises(Unsupported):
        merge(base, [pack], tmp_path / "merged")


@pytest.mark.sampled(5)
@pytest.mark.parametrize("targets", [SQUARE, EVERY], ids=["square", "every"])
@pytest.mark.parametrize("label", THEIRS)
def test_merge_is_attach_is_peft(label: str, targets: list[str], base: Path, tmp_path: Path) -> None:
    """Within 1e-5 of the change, from the folder that PEFT wrote; the pack made of it with the base knows its
    layers.
    """
    method, config = THEIRS[label]
    theirs = written(config(target_modules=targets, task_type="CAUSAL_LM"), tmp_path / "theirs", gpt2())
    size = np.abs(theirs - outputs(gpt2())).max()
    assert size > 0.02, "the adapter does something"
    pack = load(tmp_path / "theirs")
    assert pack.method.name == method
    # a float32 forward pass
    assert np.abs(outputs(attach(gpt2(), pack), torch.float32) - theirs).max() < CLOSE * max(size, 0.5)
    merge(base, [pack], tmp_path / "merged", durable=False)
    assert np.abs(outputs(GPT2LMHeadModel.from_pretrained(tmp_path / "merged")) - theirs).max() < CLOSE * size
    convert(tmp_path / "theirs", tmp_path / "pack", to="pack", base=base)
    assert {group.kind for group in load(tmp_path / "pack").manifest.groups if group.role == "adapter"} == {
        "transposed"
    }
    again = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "pack")
    assert np.abs(outputs(again) - theirs).max() < CLOSE * size


@pytest.mark.parametrize("targets", [[LAYERS[1]], LAYERS[0]], ids=["list", "text"])
def test_unilora_by_its_seed_alone(targets: list[str] | str, base: Path, tmp_path: Path) -> None:
    """Without stored indices a site has no tensors at all: the base still says how it lies."""
    config = peft.UniLoraConfig(r=2, theta_d_length=30, target_modules=targets, task_type="CAUSAL_LM")
    theirs = written(config, tmp_path / "theirs", gpt2())
    size = np.abs(theirs - outputs(gpt2())).max()
    merge(base, [tmp_path / "theirs"], tmp_path / "merged", durable=False)
    assert np.abs(outputs(GPT2LMHeadModel.from_pretrained(tmp_path / "merged")) - theirs).max() < CLOSE * size


@pytest.mark.parametrize("label", ["hira", "tinylora"])
def test_what_else_has_a_checkpoint_alone(label: str, base: Path, tmp_path: Path) -> None:
    """Resizing, composing and auditing look at the base's weight as PEFT does, by the square layers alone as
    by all.
    """
    config = THEIRS[label][1](target_modules=EVERY, task_type="CAUSAL_LM")
    theirs = written(config, tmp_path / "theirs", gpt2())
    size = np.abs(theirs - outputs(gpt2())).max()
    made = compose([tmp_path / "theirs"], weights=[1.0], base=base, energy=1 - 1e-12)
    assert np.abs(
        outputs(attach(gpt2(), made, check_base=False), torch.float32) - theirs
    ).max() < CLOSE * max(size, 0.5)
    found = audit([tmp_path / "theirs"], base=base)
    merged = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "theirs").merge_and_unload()
    for site in found.sites:
        before, after = (
            model.get_submodule(site.path).weight.detach().double().numpy() for model in (gpt2(), merged)
        )
        sizes = np.sum(before**2), np.sum((after - before) ** 2)
        # the change is cut
        assert (site.measures.base, site.measures.gram[0, 0]) == pytest.approx(sizes, rel=1e-2)
    assert [site.path for site in found.sites] == LAYERS


@pytest.mark.long
def test_graphs_of_such_a_base(tmp_path: Path) -> None:
    """A bank holds the adapter, and its graph takes the fold, by its site map and by the checkpoint's
    numbers: all give PEFT's.
    """
    gpt2().transformer.save_pretrained(tmp_path / "base")
    theirs = written(
        THEIRS["hira"][1](target_modules=EVERY[:2], task_type="FEATURE_EXTRACTION"),
        tmp_path / "theirs",
        gpt2().transformer,
    )
    bundle = export(
        tmp_path / "base", [tmp_path / "theirs"], tmp_path / "bank", mode="bank", frontend="transformers"
    )
    assert bundle.parity["max_abs"]["theirs"] < 1e-4
    for folder, checkpoint in (("by the map", None), ("by numbers", tmp_path / "base")):
        merge(tmp_path / "bank", [tmp_path / "theirs"], tmp_path / folder, checkpoint=checkpoint)
        session = onnxruntime.InferenceSession(tmp_path / folder / "model.onnx")
        (found,) = session.run(
            None, {"input_ids": IDS.numpy(), "attention_mask": np.ones(IDS.shape, np.int64)}
        )
        assert np.abs(found - theirs).max() < CLOSE * np.abs(theirs - outputs(gpt2().transformer)).max()


def test_layers_of_these_names_that_are_not_transposed(tmp_path: Path) -> None:
    """GPT-BigCode has linear layers of GPT-2's names, and PEFT's flag may be wrong in a folder: the biases of
    the base tell.
    """
    torch.manual_seed(1)
    model = GPTBigCodeForCausalLM(
        GPTBigCodeConfig(
            vocab_size=31,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_inner=24,
            n_positions=16,
            multi_query=False,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    ).eval()
    model.save_pretrained(tmp_path / "base")
    theirs = written(
        peft.HiraConfig(r=3, target_modules=SQUARE, task_type="CAUSAL_LM"),
        tmp_path / "theirs",
        copy.deepcopy(model),
    )
    told = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps({**told, "fan_in_fan_out": True}))
    assert {group.kind for group in load(tmp_path / "theirs").manifest.groups} == {"transposed"}
    merge(tmp_path / "base", [tmp_path / "theirs"], tmp_path / "merged", durable=False)
    merged = GPTBigCodeForCausalLM.from_pretrained(tmp_path / "merged")
    assert np.abs(outputs(merged) - theirs).max() < CLOSE * np.abs(theirs - outputs(model)).max()


def checkpoint(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Checkpoint:
    """A checkpoint of tensors of these shapes."""
    folder.mkdir()
    safetensors.write(
        folder / "model.safetensors", {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    )
    return Checkpoint(folder)


def layer(path: str, *shape: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer with a bias."""
    return {f"{path}.weight": shape, f"{path}.bias": (outputs,)}


def test_what_the_biases_of_a_base_show(tmp_path: Path) -> None:
    """A layer's own bias, those of layers of its name, transformers' names for such layers; a square layer of
    another name stays open.
    """
    base = checkpoint(
        tmp_path / "base",
        {
            **layer("h.0.attn.c_attn", 4, 12, outputs=12),
            **layer("h.0.attn.c_proj", 4, 4, outputs=4),
            **layer("h.0.mlp.c_proj", 16, 4, outputs=4),
            **layer("h.0.crossattention.q_attn", 4, 4, outputs=4),
            **layer("score.dense", 4, 4, outputs=4),
            **layer("score.out_proj", 2, 4, outputs=2),
            "lm_head.weight": (9, 4),
        },
    )
    assert {
        name.removesuffix(".weight"): base.linear_kind(name)
        for name in base.tensors
        if name.endswith("weight")
    } == {
        "h.0.attn.c_attn": "transposed",
        "h.0.attn.c_proj": "transposed",
        "h.0.mlp.c_proj": "transposed",
        "h.0.crossattention.q_attn": "transposed",
        "score.dense": None,
        "score.out_proj": "linear",
        "lm_head": "linear",
    }
    plain = checkpoint(
        tmp_path / "plain", {**layer("c_proj", 4, 4, outputs=4), **layer("c_fc", 8, 4, outputs=8)}
    )
    assert (plain.linear_kind("c_proj.weight"), plain.linear_kind("c_fc.weight")) == (None, "linear")


def test_a_layer_that_nothing_shows_is_refused_by_name(tmp_path: Path) -> None:
    """A square layer of an unknown name beside transposed ones: a pack that was saved from the model can be
    merged, PEFT's folder not.
    """
    model = gpt2()
    model.transformer.h[0].attn.other = Conv1D(16, 16)
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["attn.other"], task_type="CAUSAL_LM")
    written(config, tmp_path / "theirs", copy.deepcopy(model))
    with pytest.raises(Unsupported, match=r"which way round the base stores.*transformer\.h\.0\.attn\.other"):
        merge(tmp_path / "base", [tmp_path / "theirs"], tmp_path / "merged")
    adapted = attach(copy.deepcopy(model), load(tmp_path / "theirs"))
    pack = adapterpack.save(adapted, tmp_path / "pack", base=tmp_path / "base")
    assert next(iter(match_layers(pack, Checkpoint(tmp_path / "base")).adapters())).site.kind == "transposed"
    merge(tmp_path / "base", [pack], tmp_path / "merged")
    merged = Checkpoint(tmp_path / "merged").read("transformer.h.0.attn.other.weight")
    (adapter,) = pack.adapters()
    change = adapter.config.scale * adapter.params["lora_B"] @ adapter.params["lora_A"]
    np.testing.assert_allclose(
        merged - model.transformer.h[0].attn.other.weight.detach().numpy(), change.T, atol=1e-6
    )
