"""Adapters of LyCORIS in kohya's form, and what models give with them: ``python make_lycoris.py FOLDER
[back]``, in an environment with ``lycoris-lora``.

``FOLDER/bases/FAMILY`` are checkpoints. It writes ``adapters/FAMILY/NAME.safetensors`` and
``made.safetensors`` (FAMILY/NAME -> the outputs); with ``back`` it loads ``back/FAMILY/NAME.safetensors``
instead, and writes ``back.safetensors``. They are those of LyCORIS' own forward, with which adapters are
trained: its merge multiplies LoHa and LoKr by their scale twice.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from safetensors.torch import load_file, save_file

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "lora": {"algo": "locon"},
        "dora": {"algo": "locon", "dora_wd": True},
        "loha": {"algo": "loha"},
        "lokr": {"algo": "lokr"},
        "lokr_factor": {"algo": "lokr", "factor": 3, "decompose_both": True, "linear_dim": 1},
        "lokr_whole": {"algo": "lokr", "full_matrix": True},
        "glora": {"algo": "glora"},
        "ia3": {"algo": "ia3"},
        "full": {"algo": "full"},
    },
    "bert": {"norm": {"algo": "locon", "train_norm": True}, "full_bias": {"algo": "full"}},
    "resnet": {
        "locon": {"algo": "locon"},
        "tucker": {"algo": "locon", "use_tucker": True},
        "dora": {"algo": "locon", "dora_wd": True},
        "loha": {"algo": "loha"},
        "loha_tucker": {"algo": "loha", "use_tucker": True},
        "lokr": {"algo": "lokr", "linear_dim": 1},
        "lokr_tucker": {"algo": "lokr", "linear_dim": 1, "use_tucker": True},
    },
}
TARGETS = {
    "llama": ["LlamaAttention", "LlamaMLP"],
    "bert": ["BertAttention", "BertIntermediate"],
    "resnet": ["ResNetBasicLayer"],
}


def main(folder: Path, back: bool) -> None:
    """Every case of every family."""
    torch.manual_seed(0)
    inputs, kept = load_file(folder / "ids.safetensors"), {}
    for family, cases in CASES.items():
        for name, options in cases.items():
            config = transformers.AutoConfig.from_pretrained(folder / "bases" / family)
            model = (
                getattr(transformers, config.architectures[0])
                .from_pretrained(folder / "bases" / family)
                .eval()
            )
            LycorisNetwork.apply_preset(
                {"target_module": TARGETS[family], "target_name": [], "lora_prefix": "lora_te"}
            )
            preset = folder / "preset.toml"
            preset.write_text(
                f"target_module = {TARGETS[family]!r}\ntarget_name = []\nlora_prefix = "
                '"lora_te"\nenable_conv = true\n'
            )
            place = folder / ("back" if back else "adapters") / family / f"{name}.safetensors"
            if back and not place.is_file():
                continue
            if back:
                network, _ = create_lycoris_from_weights(1.0, str(place), model)
                network.apply_to()
            else:
                network = create_lycoris(
                    model, 1.0, **{"linear_dim": 2, "linear_alpha": 3, "preset": str(preset), **options}
                )
                network.apply_to()
                for value in network.parameters():
                    value.data.add_(0.3 * torch.randn(value.shape))
            place.parent.mkdir(parents=True, exist_ok=True)
            network.eval()
            with torch.no_grad():
                found = model(inputs["pixels" if family == "resnet" else "ids"])
            kept[f"{family}/{name}"] = (found.logits if "logits" in found else found[0]).contiguous()
            if not back:
                network.save_weights(str(place), torch.float32, {})
            if not place.is_file():
                raise SystemExit(f"{place} was not written")
    save_file(kept, folder / ("back.safetensors" if back else "made.safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["back"])
