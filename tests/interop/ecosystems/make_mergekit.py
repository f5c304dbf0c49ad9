"""LoRAs that mergekit extracts from trained models: ``python make_mergekit.py FOLDER``, in an environment
with mergekit.

``FOLDER/bases/FAMILY`` are checkpoints. It writes ``adapters/FAMILY/NAME`` and ``made.safetensors``
(FAMILY/NAME -> logits of the trained model, which the adapter gives back: its rank is that of the change).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

EXTRACT = Path(sys.executable).with_name("mergekit-extract-lora")
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("q_proj", "v_proj", "down_proj"), ()),
    "whole": (("q_proj", "up_proj", "norm", "lm_head", "embed_tokens"), ()),
    "embedded": (("k_proj", "embed_tokens"), ("--embed-lora",)),
}
"""Name -> the ends of what was trained, and mergekit's options."""
RANK = 3


def trained(model: Any, ends: tuple[str, ...]) -> None:
    """Changes weights by products of a low rank, whose rank differs by layer, and norms by themselves."""
    for number, (name, value) in enumerate(model.named_parameters()):
        if not any(f"{end}.weight" in name for end in ends):
            continue
        rank = RANK - number % 2
        change = (
            torch.randn(len(value), rank) @ torch.randn(rank, value.shape[1])
            if value.ndim == 2
            else torch.randn(len(value))
        )
        value.data.add_(0.1 * change)


def main(folder: Path) -> None:
    """Every case of every family."""
    torch.manual_seed(0)
    ids, kept = load_file(folder / "ids.safetensors")["ids"], {}
    for family in ("llama",):
        for name, (ends, options) in CASES.items():
            base, tuned, out = (folder / place / family for place in ("bases", f"tuned-{name}", "adapters"))
            model = AutoModelForCausalLM.from_pretrained(base).eval()
            trained(model, ends)
            model.save_pretrained(tuned)
            with torch.no_grad():
                kept[f"{family}/{name}"] = model(ids).logits.contiguous()
            command = [
                EXTRACT,
                "--model",
                tuned,
                "--base-model",
                base,
                "--out-path",
                out / name,
                "--max-rank",
                "4",
                "--no-copy-tokenizer",
                *options,
            ]
            subprocess.run(list(map(str, command)), check=True)
    save_file(kept, folder / "made.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
