"""PEFT's adapters whose initialisation rewrote the base: on the untouched base they are LoRAs of twice the
rank.

The right change of a weight is ``s (B A - B0 A0)``, with ``B0 A0`` by numpy's decompositions in float64;
PEFT's model is another judge. Its factors are float32: a decomposition is off by some roundings of the
largest singular value.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from noise import shake
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from adapterpack import attach, convert, load, merge, validate
from adapterpack.errors import AdapterpackError, Unsupported

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["q_proj", "down_proj"]
IDS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(7))
CLOSE = 2e-5
"""Of the largest output: float32 decompositions, and sums of twice the rank."""
OPTIONS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa over root r": {"init_lora_weights": "pissa", "use_rslora": True, "lora_alpha": 5},
    "pissa by pattern": {
        "init_lora_weights": "pissa",
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"down_proj": 5},
    },
    "pissa of dora": {"init_lora_weights": "pissa", "use_dora": True},
    "pissa of more than the width": {"init_lora_weights": "pissa", "rank_pattern": {"down_proj": 90}},
    "olora": {"init_lora_weights": "olora"},
    "olora over root r": {"init_lora_weights": "olora", "use_rslora": True},
}


@torch.no_grad()
def trained(model: Any, **told: Any) -> Any:
    """PEFT's model with an adapter whose factors have moved."""
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 3, "lora_alpha": 4, "task_type": "CAUSAL_LM", **told})
    )
    return shake(theirs, 0.1, 5).eval()


@torch.no_grad()
def logits(model: Any) -> np.ndarray:
    found: np.ndarray = model.eval()(input_ids=IDS % 31).logits.numpy()
    return found


def part(weight: np.ndarray, init: str, r: int, scale: float) -> np.ndarray:
    """``s B0 A0`` of a weight ``[out, in]``, in float64."""
    wide = weight.astype(np.float64)
    if init == "pissa":
        u, s, vt = np.linalg.svd(wide)
        return (u[:, :r] * s[:r]) @ vt[:r]
    q, upper = np.linalg.qr(wide)
    return scale * q[:, :r] @ upper[:r]


@pytest.mark.parametrize("label", OPTIONS)
def test_on_the_untouched_base(label: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Attached to the base: PEFT's logits on the base that it rewrote, before saving and after loading.
    Merged: the formula.
    """
    theirs = trained(LlamaForCausalLM.from_pretrained(tiny_llama), target_modules=TARGETS, **OPTIONS[label])
    theirs.save_pretrained(tmp_path / "theirs")
    wanted, plain = logits(theirs), logits(LlamaForCausalLM.from_pretrained(tiny_llama))
    most = CLOSE * np.abs(wanted).max()
    assert np.abs(wanted - plain).max() > 1e3 * most
    done = convert(tmp_path / "theirs", tmp_path / "pack", to="pack", base=tiny_llama)
    assert any("rewrote the base" in note for note in done.notes)
    found = {finding.rule for finding in validate(tmp_path / "pack", base=tiny_llama).findings}
    # warnings of a rank above the width, and of its size
    assert found == ({"AP406", "AP704"} if "width" in label else set())
    pack = load(tmp_path / "pack")
    for model in (
        attach(LlamaForCausalLM.from_pretrained(tiny_llama), pack),
        peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama), tmp_path / "theirs"),
        peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama), tmp_path / "pack"),
    ):
        assert np.abs(logits(model) - wanted).max() < most
    if "use_dora" in OPTIONS[label]:
        return
    merge(tiny_llama, [pack], tmp_path / "merged", durable=False)
    before, after, factors = (
        load_file(folder / name)
        for folder, name in (
            (tiny_llama, "model.safetensors"),
            (tmp_path / "merged", "model.safetensors"),
            (tmp_path / "theirs", "adapter_model.safetensors"),
        )
    )
    init = OPTIONS[label]["init_lora_weights"]
    for path, config in ((group.path, pack.config_at(group)) for group in pack.manifest.groups):
        A, B = (
            factors[f"base_model.model.{path}.lora_{side}.weight"].numpy().astype(np.float64) for side in "AB"
        )
        weight = before[f"{path}.weight"].numpy()
        right = weight + config.scale * B @ A - part(weight, init, len(A), config.scale)
        values = np.linalg.svd(weight, compute_uv=False)
        whole = len(A) == len(values)
        # roundings over the gap
        turned = values[0] / (values[len(A) - 1] - values[len(A)]) if init == "pissa" and not whole else 1
        np.testing.assert_allclose(
            after[f"{path}.weight"].numpy(), right, rtol=0, atol=1e-6 * values[0] * max(1, turned)
        )


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_of_transposed_layers(init: str, tmp_path: Path) -> None:
    """GPT-2's ``Conv1D``: PEFT decomposes for OLoRA what the layer stores, and then starts elsewhere than at
    the base: so it is here.
    """
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=31,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=16,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()
    model.save_pretrained(tmp_path / "base")
    theirs = trained(copy.deepcopy(model), target_modules=["attn.c_proj"], init_lora_weights=init)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "pack", to="pack", base=tmp_path / "base")
    wanted = logits(theirs)
    assert np.abs(logits(model) - wanted).max() > 1e-3
    assert (
        np.abs(logits(attach(model, load(tmp_path / "pack"))) - wanted).max() < CLOSE * np.abs(wanted).max()
    )


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga", "loftq", "something new"])
def test_what_the_base_does_not_say(init: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Data or a random projection decided: refused with the base, too, with what to do in PEFT."""
    trained(LlamaForCausalLM.from_pretrained(tiny_llama), target_modules=TARGETS).save_pretrained(
        tmp_path / "theirs"
    )
    config = tmp_path / "theirs" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": init}))
    for told in ({}, {"base": tiny_llama}):
        with pytest.raises(
            Unsupported, match=r"initialisation rewrote.*path_initial_model_for_weight_conversion"
        ):
            convert(tmp_path / "theirs", tmp_path / "out", to="pack", **told)


def test_without_the_base(tiny_llama: Path, tmp_path: Path) -> None:
    """Refused by name, with the command that makes a pack of it."""
    theirs = trained(
        LlamaForCausalLM.from_pretrained(tiny_llama), target_modules=TARGETS, init_lora_weights="pissa"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    for read in (
        lambda: load(tmp_path / "theirs"),
        lambda: convert(tmp_path / "theirs", tmp_path / "out", to="pack"),
        lambda: merge(tiny_llama, [tmp_path / "theirs"], tmp_path / "out"),
    ):
        with pytest.raises(Unsupported, match=r"initialisation rewrote.*convert SRC --to pack --base"):
            read()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_weight_that_leaves_it_open(init: str, tmp_path: Path) -> None:
    """Equal singular values, columns that depend on each other: two libraries would take other parts of the
    weight.
    """
    weight = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))[0]
    weight[:, 1] = weight[:, 0] if init == "olora" else weight[:, 1]
    net = nn.Sequential(nn.Linear(12, 12))
    with torch.no_grad():
        net[0].weight.copy_(weight)
    (tmp_path / "base").mkdir()
    save_file(
        {key: value.contiguous() for key, value in net.state_dict().items()},
        tmp_path / "base" / "model.safetensors",
    )
    (tmp_path / "base" / "config.json").write_text("{}")
    trained(net, target_modules=["0"], init_lora_weights=init, task_type=None).save_pretrained(
        tmp_path / "theirs"
    )
    with pytest.raises(AdapterpackError, match="not certain"):
        convert(tmp_path / "theirs", tmp_path / "out", to="pack", base=tmp_path / "base")
