"""Adapters of stacks of experts in graphs, another one for each row: beside PEFT's own model in float64, and
W + s B A of each expert.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from invariants.bundles import Reference, check

from adapterpack import LoRA, Pack, adapt, convert, export, load, save
from adapterpack.runtime.sessions.session import Session
from adapterpack.tasks.task import get_task

pytestmark = pytest.mark.filterwarnings("ignore")
_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MANY = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    # gate and up projection as wide as the hidden states: no shape tells which way round a stack lies
    "qwen3_moe": _MANY,
    # chosen one by one, and every expert multiplies every token
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1},
    "gpt_oss": {**_LOCAL, "intermediate_size": 32},
    "mixtral": _LOCAL,
    "qwen2_moe": {**_MANY, "shared_expert_intermediate_size": 20},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": _LOCAL,
    "glm4_moe": {**_MANY, **_ROUTED},
}
SHORT = frozenset({"qwen3_moe", "llama4_text"})


def _shake(model: torch.nn.Module, size: float, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.copy_(size * torch.randn_like(value))


def _load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def make(family: str, root: Path) -> tuple[Path, Path, Pack, Pack]:
    """A base, PEFT's adapter of its experts and router, a pack of its experts, and one of its attention."""
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **{**_SIZES, **FAMILIES[family]})
    )
    _shake(model, 0.3, 1)
    model.save_pretrained(root / "base")
    router = next(
        name for name, _ in model.named_parameters() if name.endswith(("router.weight", "gate.weight"))
    )
    named = [name for name, value in model.named_parameters() if ".experts." in name and value.ndim == 3]
    theirs = peft.get_peft_model(
        _load(root / "base"),
        peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=[*named, router]),
    )
    _shake(theirs, 0.3, 2)
    theirs.save_pretrained(root / "theirs")
    packs = []
    for number, (rank, targets) in enumerate([(3, ("all-experts",)), (1, ("q_proj", "o_proj"))]):
        ours = adapt(_load(root / "base"), LoRA(r=rank, alpha=2, targets=targets))
        _shake(ours, 0.3, 3 + number)
        packs.append(save(ours, root / f"ours{number}", base=root / "base", name=f"ours{number}"))
    return root / "base", root / "theirs", packs[0], packs[1]


class OfPeft(Reference):
    """PEFT's own model."""

    def __init__(self, base: Path, adapter: Path) -> None:
        super().__init__(get_task("text-generation"), base)
        self.model = peft.PeftModel.from_pretrained(self.model, adapter).double().eval()


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.long] * (name not in SHORT)) for name in FAMILIES]
)
def test_each_row_has_its_own_experts(family: str, tmp_path: Path) -> None:
    """Ragged rows, every adapter beside every other and beside the base, in a bank of three."""
    base, theirs, *ours = make(family, tmp_path)
    pack = convert(theirs, tmp_path / "pack", to="pack", base=base).path
    bundle = export(base, [pack, *ours], tmp_path / "bundle", mode="bank", frontend="transformers")
    assert bundle.decoder or family == "gpt_oss"
    task = get_task("text-generation")
    known = {
        None: Reference(task, base),
        load(pack).name: OfPeft(base, theirs),
        **{one.name: Reference(task, base, one, tmp_path / f"folded-{one.name}") for one in ours},
    }
    check(Session(tmp_path / "bundle"), known)
