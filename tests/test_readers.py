"""Who loads a pack's folder: what is said of each method is measured with the PEFT and the transformers that
are installed.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from noise import shake
from transformers import LlamaConfig, LlamaForCausalLM

from adapterpack import LoRA, adapt, save
from adapterpack.adapter_methods import METHODS, methods
from adapterpack.peft.readers import line, readers

IDS = torch.tensor([[5, 9, 3, 7, 8, 2], [1, 4, 6, 3, 7, 9]])
SETTINGS: dict[str, dict[str, Any]] = {
    "alora": {"alora_invocation_tokens": (3, 7)},
    "road": {"group_size": 2},
}
"""What a method needs at this model besides its first example."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            pad_token_id=0,
            max_position_embeddings=64,
        )
    ).save_pretrained(folder := tmp_path_factory.mktemp("base"))
    return LlamaForCausalLM.from_pretrained(folder).eval()


def _pack(model: Any, name: str, out: Path) -> tuple[Any, torch.Tensor]:
    """A shaken adapter of the method's first example at queries and values, and what it gives."""
    example = METHODS[name].examples[0]
    fields = {field.name for field in dataclasses.fields(example)}
    at_layers = METHODS[name].kind == "weight" and "linear" in METHODS[name].traits.layers
    more = {
        **({"targets": ("q_proj", "v_proj")} if "targets" in fields and at_layers else {}),
        **({"dropout": 0.0} if "dropout" in fields else {}),
        **SETTINGS.get(name, {}),
    }
    adapted = shake(adapt(copy.deepcopy(model), dataclasses.replace(example, **more), "a"), 0.1, 1).eval()
    return save(adapted, out), _said(adapted)


def _said(model: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        # PEFT gives logits of virtual tokens, too
        return model(input_ids=IDS, **more).logits[:, -IDS.shape[1] :]


def _error(load: Any, wanted: torch.Tensor, base: Any, **more: Any) -> float:
    """How far a library is off, of the change; infinite where it refuses."""
    try:
        found = _said(load().eval(), **more)
    except ValueError:
        return float("inf")
    return float((found - wanted).abs().max() / (wanted - _said(base)).abs().max())


def _by_transformers(base: Any, folder: Path) -> Any:
    model = copy.deepcopy(base)
    model.load_adapter(str(folder))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("lora", "dora", "alora", "vera", "poly", "prompt_tuning", "oft", "tinylora")
        else pytest.param(name, marks=pytest.mark.long)
        for name, method in methods().items()
        if method.peft
    ],
)
def test_who_loads_the_folder_of_a_method_is_measured(name: str, base: Any, tmp_path: Path) -> None:
    """Right is within 1e-3 of the change, wrong is a refusal or off by more than a tenth of it; nothing is in
    between.
    """
    pack, wanted = _pack(base, name, tmp_path / "pack")
    said = readers(pack)
    assert (tmp_path / "pack" / "adapter_config.json").exists() == (said["PEFT"] == "")
    if said["PEFT"]:
        return
    task = {"task_ids": torch.zeros(len(IDS), dtype=torch.long)} if METHODS[name].config.task_field else {}
    assert (
        _error(
            lambda: peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "pack"),
            wanted,
            base,
            **task,
        )
        < 1e-3
    )
    error = _error(lambda: _by_transformers(base, tmp_path / "pack"), wanted, base)
    assert error > 0.1 if said["transformers"] else error < 1e-3


def test_vllm_takes_a_lora_of_a_language_model() -> None:
    """The rule of its loader, which ``tests/interop/vllm_loads.py`` asks itself."""
    assert [
        name
        for name, method in methods().items()
        if method.peft is not None and "vLLM" not in method.peft.refused_by
    ] == ["lora"]


def test_save_says_who_loads_what_it_wrote(
    base: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "adapterpack"):
        save(adapt(copy.deepcopy(base), LoRA(r=2), "a"), tmp_path / "lora")
        pack, _ = _pack(base, "dora", tmp_path / "dora")
    assert "PEFT and transformers and vLLM load this folder" in caplog.text
    assert (
        "not so transformers: it leaves the lengths as the base has them; vLLM: it takes LoRA alone"
        in caplog.text
    )
    assert line(pack) in caplog.text
