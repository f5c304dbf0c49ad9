"""Adapters whose tensors are stored in narrow floats: attached, merged and exported they are what PEFT
computes from the same file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import adapterpack
from adapterpack.io.safetensors import dtype_name
from adapterpack.runtime.padding import pad
from adapterpack.runtime.sessions.session import Session

pytestmark = pytest.mark.fast

IDS = [[5, 17, 40, 8, 61, 33, 7], [9, 9, 50, 2, 11, 72, 90]]
NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""A dtype and its name in safetensors."""
WITHIN = 1e-5
"""Of logits of size 3: float32 in another order."""


def causal(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> np.ndarray:
    return model(input_ids=torch.tensor(IDS)).logits.numpy()


def saved_by_peft(base: Path, folder: Path, dtype: torch.dtype) -> Path:
    """A LoRA of PEFT's with random tensors of that dtype."""
    model = peft.get_peft_model(
        causal(base),
        peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"]),
        autocast_adapter_dtype=False,
    )
    generator = torch.Generator().manual_seed(4)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = (0.3 * torch.randn(value.shape, generator=generator)).to(dtype)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_attached_merged_and_exported_it_is_what_peft_computes(
    dtype: torch.dtype, tiny_llama: Path, tmp_path: Path
) -> None:
    """PEFT widens the tensors to float32 when it loads them; so do attach, merge and a bank, each within 1e-5
    of its logits.
    """
    folder = saved_by_peft(tiny_llama, tmp_path / "adapter", dtype)
    pack = adapterpack.load(folder)
    stored = {dtype_name(value.dtype) for value in pack.params("model.layers.0.self_attn.q_proj").values()}
    assert stored == {NAMES[dtype]}
    expected = logits(peft.PeftModel.from_pretrained(causal(tiny_llama), folder).eval())
    assert np.abs(expected - logits(causal(tiny_llama))).max() > 0.1, "the adapter does something"
    attached = adapterpack.attach(causal(tiny_llama), pack)
    assert {value.dtype for value in attached.parameters()} == {torch.float32}
    np.testing.assert_allclose(logits(attached), expected, rtol=0, atol=WITHIN)
    adapterpack.merge(tiny_llama, [pack], tmp_path / "merged")
    np.testing.assert_allclose(logits(causal(tmp_path / "merged")), expected, rtol=0, atol=WITHIN)
    adapterpack.export(tiny_llama, [pack], tmp_path / "bundle", mode="bank")
    found = Session(tmp_path / "bundle").run(pad(IDS, 0, left=True), [pack.name] * len(IDS))["logits"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=WITHIN)
