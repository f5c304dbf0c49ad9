"""LoRAs of torchtune in its own form, and in PEFT's where it can write that: ``python make_torchtune.py FOLDER``,
in an environment with torchtune.

``FOLDER/bases/FAMILY`` are checkpoints. It writes ``adapters/FAMILY/NAME`` (PEFT's form) and ``NAME-own`` as
torchtune's checkpointer does, and ``made.safetensors`` (FAMILY/NAME -> the logits of torchtune's own model).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torchtune.models.convert_weights import (
    hf_to_tune,
    tune_to_peft_adapter_config,
    tune_to_peft_adapter_weights,
)
from torchtune.models.llama2 import lora_llama2
from torchtune.models.qwen2 import lora_qwen2
from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune
from torchtune.modules.peft import get_adapter_state_dict, get_lora_module_names

RANK, ALPHA = 3, 5.0
CASES = {
    "llama/attention": (["q_proj", "k_proj", "output_proj"], False, False, False),
    "llama/all": (["q_proj", "v_proj"], True, True, False),
    "llama/dora": (["q_proj", "k_proj", "v_proj"], True, False, True),
    "qwen2/all": (["q_proj", "k_proj", "v_proj", "output_proj"], True, False, False),
}
"""Family/name -> the adapted parts of attention, whether the feed-forward and the output layer are, and whether it
is DoRA.
"""
PEFTS = ("llama/attention", "llama/all")
"""What torchtune writes rightly in PEFT's form: it says nothing of DoRA there, and puts the queries and keys of
Qwen2 into an order that neither model has.
"""
MODELS = {"llama": (lora_llama2, hf_to_tune), "qwen2": (lora_qwen2, qwen2_hf_to_tune)}


def main(folder: Path) -> None:
    """Every case."""
    torch.manual_seed(0)
    ids, kept = load_file(folder / "ids.safetensors")["ids"], {}
    for name, (attention, mlp, output, dora) in CASES.items():
        family = name.partition("/")[0]
        base, (make, from_hf) = folder / "bases" / family, MODELS[family]
        config = json.loads((base / "config.json").read_text())
        sizes = {"num_heads": config["num_attention_heads"], "num_kv_heads": config["num_key_value_heads"]}
        tied = {"tie_word_embeddings": True} if family == "qwen2" else {}
        weights = from_hf(load_file(base / "model.safetensors"), dim=config["hidden_size"], **sizes, **tied)
        model = make(
            attention,
            mlp,
            *([] if tied else [output]),
            vocab_size=config["vocab_size"],
            num_layers=config["num_hidden_layers"],
            embed_dim=config["hidden_size"],
            intermediate_dim=config["intermediate_size"],
            max_seq_len=32,
            norm_eps=config["rms_norm_eps"],
            lora_rank=RANK,
            lora_alpha=ALPHA,
            use_dora=dora,
            **sizes,
            **tied,
        ).eval()
        missing = model.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys and all(
            "lora" in key or "magnitude" in key for key in missing.missing_keys
        ), missing
        for module in model.modules() if dora else ():
            if hasattr(module, "initialize_dora_magnitude"):
                module.initialize_dora_magnitude()
        mine = get_adapter_state_dict(model.state_dict())
        for key, value in mine.items():
            value.mul_(1 + 0.3 * torch.rand(value.shape)) if "magnitude" in key else value.add_(
                0.3 * torch.randn(value.shape)
            )
        with torch.no_grad():
            kept[name] = kept[f"{name}-own"] = model(ids).float().contiguous()
        said = {
            "r": RANK,
            "lora_alpha": ALPHA,
            "target_modules": get_lora_module_names(attention, mlp, output),
            "peft_type": "LORA",
        }
        config_of_peft = json.dumps(tune_to_peft_adapter_config(said, "org/model"))
        own = folder / "adapters" / f"{name}-own"
        own.mkdir(parents=True)
        torch.save(mine, own / "adapter_model.pt")
        (own / "adapter_config.json").write_text(config_of_peft)
        if name not in PEFTS:
            del kept[name]
            continue
        place = folder / "adapters" / name
        place.mkdir(parents=True)
        tensors = tune_to_peft_adapter_weights(mine, dim=config["hidden_size"], **sizes)
        save_file(
            {key: value.contiguous() for key, value in tensors.items()},
            place / "adapter_model.safetensors",
            {"format": "pt"},
        )
        (place / "adapter_config.json").write_text(config_of_peft)
    save_file({name: value.clone() for name, value in kept.items()}, folder / "made.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
