"""How adapters go to PEFT and come from it: read this first."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM

import adapterpack

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def test_peft_loads_a_pack(tiny_llama: Path, tmp_path: Path) -> None:
    """A pack is a folder that PEFT loads as it is, and computes the same."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    adapterpack.adapt(model, adapterpack.LoRA(r=4, targets="all-linear"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
        ours = model(input_ids=IDS).logits
    adapterpack.save(model, tmp_path / "pack", base=tiny_llama)
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "pack"
    )
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(input_ids=IDS).logits, ours, rtol=0, atol=1e-5)


def test_a_folder_of_peft_is_used_like_a_pack(tiny_llama: Path, tmp_path: Path) -> None:
    """What PEFT saved is loaded, attached and merged without a step between."""
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    adapterpack.attach(model, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=0, atol=1e-5
        )
    assert adapterpack.merge(tiny_llama, [tmp_path / "theirs"], tmp_path / "merged").tensors_changed == 4
