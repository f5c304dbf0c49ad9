"""What older versions of PEFT wrote, and meant, otherwise. ``interop/peft_versions.py`` asks the versions themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from noise import shake
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from adapterpack import attach, load
from adapterpack.errors import Unsupported

IDS = torch.tensor([[3, 9, 4, 11, 5]])
SIZES = {
    "vocab_size": 16,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}


def rewritten(folder: Path, *left_out: str, **more: Any) -> Path:
    """A folder with keys of its configuration left out and others added."""
    file = folder / "adapter_config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in left_out}
    file.write_text(json.dumps({**config, **more}))
    return folder


def test_lokr_had_no_alpha_before_0_14(tiny_llama: Path, tmp_path: Path) -> None:
    """Its configuration had no ``rank_dropout_scale``; PEFT today scales such a folder by alpha / r."""
    config = peft.LoKrConfig(r=2, alpha=2, target_modules=["q_proj"], rank_pattern={"0.self_attn.q_proj": 4})
    meant = shake(peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config), 0.3, 4)
    for module in meant.modules():
        if hasattr(module, "lokr_w1"):
            module.scaling["default"] = 1.0
    meant.save_pretrained(tmp_path)
    old = load(rewritten(tmp_path, "rank_dropout_scale", alpha=16))
    ours = attach(AutoModelForCausalLM.from_pretrained(tiny_llama), old)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, meant(IDS).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_bias_of_a_layer_kept_its_name_before_0_7(bias: Any, tmp_path: Path) -> None:
    base = BertModel(BertConfig(**SIZES)).eval()
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["query"], bias=bias, task_type="FEATURE_EXTRACTION")
    theirs = shake(peft.get_peft_model(base, config).eval(), 0.3, 4)
    theirs.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = {key.replace("base_layer.bias", "bias"): value for key, value in load_file(file).items()}
    save_file(tensors, file)
    ours = attach(BertModel.from_pretrained(tmp_path / "base"), load(tmp_path / "a"))
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS)[0], theirs(input_ids=IDS)[0], atol=1e-6, rtol=0)


def test_the_first_form_of_oft_is_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    config = peft.OFTConfig(r=2, oft_block_size=0, target_modules=["q_proj"])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match=r"before 0\.16"):
        load(rewritten(tmp_path, "use_cayley_neumann", "num_cayley_neumann_terms"))
