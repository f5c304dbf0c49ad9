"""Adapters of AdapterHub's library, and what its models give with them: ``python make_adapterhub.py FOLDER
[back]``, in an environment with ``adapters``.

``FOLDER/bases/FAMILY`` are checkpoints. It writes ``adapters/FAMILY/NAME`` and ``made.safetensors``
(FAMILY/NAME -> hidden states, or logits of a head); with ``back`` it loads ``back/FAMILY/NAME`` instead, and
writes ``back.safetensors``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters import (
    AutoAdapterModel,
    CompacterConfig,
    CompacterPlusPlusConfig,
    DoubleSeqBnConfig,
    IA3Config,
    LoRAConfig,
    ParBnConfig,
    SeqBnConfig,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

CONFIGS = {
    "houlsby": DoubleSeqBnConfig(reduction_factor=4),
    "parallel": ParBnConfig(),
    "pfeiffer": SeqBnConfig(reduction_factor={"0": 3, "default": 5}),
    "compacter": CompacterConfig(phm_dim=2, reduction_factor=3),
    "factorized": CompacterPlusPlusConfig(
        phm_dim=3, reduction_factor=2, phm_rank=2, factorized_phm_rule=True, original_ln_before=False
    ),
    "lora": LoRAConfig(
        r=3, alpha=5, intermediate_lora=True, output_lora=True, attn_matrices=["q", "v"], leave_out=[0]
    ),
    "ia3": IA3Config(),
    "head": LoRAConfig(r=2, alpha=4),
}
CASES = {
    "bert": ("houlsby", "parallel", "compacter", "factorized", "lora", "ia3", "head"),
    "llama": ("houlsby", "parallel", "pfeiffer", "compacter", "lora", "ia3"),
    "gpt2": ("houlsby", "parallel", "pfeiffer", "lora", "ia3"),
}
PICKLED = ("ia3", "head")
"""Cases that are saved as the library does by default."""


def opened(family: str, base: Path) -> Any:
    """A model with places for adapters."""
    if family == "llama":
        model = LlamaForCausalLM.from_pretrained(base)
        adapters.init(model)
        return model.eval()
    return AutoAdapterModel.from_pretrained(base).eval()


def output(model: Any, name: str, ids: torch.Tensor) -> torch.Tensor:
    """Logits where the model or the adapter has a head, else the last hidden states."""
    model.set_active_adapters(name)
    with torch.no_grad():
        found = model(ids) if name == "head" or hasattr(model, "lm_head") else model.base_model(ids)
    return (found.logits if hasattr(found, "logits") else found.last_hidden_state).float().contiguous()


def main(folder: Path, back: bool) -> None:
    """Every case of every family."""
    torch.manual_seed(0)
    ids, kept = load_file(folder / "ids.safetensors")["ids"], {}
    for family, names in CASES.items():
        model = opened(family, folder / "bases" / family)
        for name in names:
            place = folder / ("back" if back else "adapters") / family / name
            if back:
                if not place.is_dir():
                    continue
                model.load_adapter(str(place), load_as=name, use_safetensors=True)
            else:
                model.add_adapter(name, config=CONFIGS[name])
                if name == "head":
                    model.add_classification_head(
                        name, num_labels=3, layers=2, id2label={0: "a", 1: "b", 2: "c"}
                    )
                for key, value in model.named_parameters():
                    if f".{name}." in f".{key}.":
                        value.data.add_(0.3 * torch.randn(value.shape))
                place.parent.mkdir(parents=True, exist_ok=True)
                model.save_adapter(
                    str(place), name, use_safetensors=name not in PICKLED, with_head=name == "head"
                )
            kept[f"{family}/{name}"] = output(model, name, ids)
            model.delete_adapter(name)
    save_file(kept, folder / ("back.safetensors" if back else "made.safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["back"])
