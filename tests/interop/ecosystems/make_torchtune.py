"""LoRAs of torchtune in PEFT's form: ``python make_torchtune.py FOLDER``, in an environment with torchtune.

``FOLDER/bases/FAMILY`` are checkpoints. It writes ``adapters/FAMILY/NAME`` as torchtune's checkpointer does,
and ``made.safetensors`` (FAMILY/NAME -> the logits of torchtune's own model).
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
from torchtune.modules.peft import get_adapter_state_dict, get_lora_module_names

RANK, ALPHA = 3, 5.0
CASES = {
    "attention": (["q_proj", "k_proj", "output_proj"], False, False),
    "all": (["q_proj", "v_proj"], True, True),
}
"""Name -> the adapted parts of attention, and whether the feed-forward and the output layer are."""


def main(folder: Path) -> None:
    """Every case."""
    torch.manual_seed(0)
    ids, kept = load_file(folder / "ids.safetensors")["ids"], {}
    base = folder / "bases" / "llama"
    config = json.loads((base / "config.json").read_text())
    sizes = {"num_heads": config["num_attention_heads"], "num_kv_heads": config["num_key_value_heads"]}
    weights = hf_to_tune(load_file(base / "model.safetensors"), dim=config["hidden_size"], **sizes)
    for name, (attention, mlp, output) in CASES.items():
        model = lora_llama2(
            attention,
            mlp,
            output,
            vocab_size=config["vocab_size"],
            num_layers=config["num_hidden_layers"],
            embed_dim=config["hidden_size"],
            intermediate_dim=config["intermediate_size"],
            max_seq_len=32,
            norm_eps=config["rms_norm_eps"],
            lora_rank=RANK,
            lora_alpha=ALPHA,
            **sizes,
        ).eval()
        missing = model.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys and all("lora" in key for key in missing.missing_keys), missing
        mine = get_adapter_state_dict(model.state_dict())
        for value in mine.values():
            value.add_(0.3 * torch.randn(value.shape))
        with torch.no_grad():
            kept[f"llama/{name}"] = model(ids).float().contiguous()
        place = folder / "adapters" / "llama" / name
        place.mkdir(parents=True)
        tensors = tune_to_peft_adapter_weights(mine, dim=config["hidden_size"], **sizes)
        save_file(
            {key: value.contiguous() for key, value in tensors.items()},
            place / "adapter_model.safetensors",
            {"format": "pt"},
        )
        said = {
            "r": RANK,
            "lora_alpha": ALPHA,
            "target_modules": get_lora_module_names(attention, mlp, output),
            "peft_type": "LORA",
        }
        (place / "adapter_config.json").write_text(json.dumps(tune_to_peft_adapter_config(said, "org/model")))
    save_file(kept, folder / "made.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
