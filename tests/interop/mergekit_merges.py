"""Files of mergekit, merged by mergekit and by ``adapterpack compose``: ``python mergekit_merges.py PYTHON``.

``PYTHON`` is that of an environment with mergekit, in which this file makes a tiny model, others tuned from it and
adapters of it, and merges them by each file. Rules of chance are compared where nothing is dropped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

CLOSE = 1e-5
"""Of entries of about 1 and changes of about as much: float32 on both sides, sums in another order."""
HALF, OTHER = {"weight": 0.6}, {"weight": 0.9}
BOTH = {"base_model": "base"}
RAISED = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0]},
    {"value": 0.5},
]


def file(method: str, own: list[dict[str, Any]], of: str = "full-", **rest: Any) -> dict[str, Any]:
    """A configuration that merges the first models of a kind, each with parameters of its own."""
    models = [
        {"model": f"{of}{name}", **({"parameters": values} if values else {})}
        for name, values in zip("abc", own, strict=False)
    ]
    return {"merge_method": method, "models": models, "dtype": "float32", **rest}


def files() -> dict[str, dict[str, Any]]:
    """The configurations by name."""
    lines, columns = {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}
    trimmed = [
        {"weight": [0, 0.3, 0.7, 1], "density": [1, 0.75, 0.25]},
        {"weight": 0.3, "density": 0.5},
        {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 0.1}], "density": 0.33},
    ]
    bands = [{"weight": 0.3, "density": 0.5, "gamma": 0.1}, {"weight": 0.3, "density": 0.8, "gamma": 0.05}]
    layers = {"layer_range": [0, 4]}
    sources = [{"model": "full-a", **layers}, {"model": "full-b", **layers}]
    lora = "base+lora-"
    kept = {"density": 1.0, "rescale": False}
    return {
        "linear": file("linear", [HALF, OTHER]),
        "linear, not normalized": file("linear", [HALF, OTHER], parameters={"normalize": False}),
        "task_arithmetic": file(
            "task_arithmetic", [HALF, {"weight": -0.3}], parameters={"lambda": 0.7}, **BOTH
        ),
        "task_arithmetic, normalized": file(
            "task_arithmetic", [HALF, OTHER], parameters={"normalize": 1.0}, **BOTH
        ),
        "ties over layers and by filter": file("ties", trimmed, **BOTH),
        "ties, not normalized": file(
            "ties", trimmed[:2], parameters={"normalize": False, "lambda": 0.5}, **BOTH
        ),
        "breadcrumbs": file("breadcrumbs", bands, parameters={"lambda": 0.5}, **BOTH),
        "breadcrumbs_ties": file("breadcrumbs_ties", bands, **BOTH),
        "dare_ties of all entries": file("dare_ties", [HALF, OTHER], parameters=kept, **BOTH),
        "della of all entries": file("della", [HALF, OTHER], **BOTH),
        "slerp": {
            "merge_method": "slerp",
            "slices": [{"sources": sources}],
            "base_model": "full-a",
            "parameters": {"t": RAISED},
            "dtype": "float32",
        },
        "nuslerp": file("nuslerp", [HALF, OTHER]),
        "nuslerp of changes": file("nuslerp", [{"weight": [0.6, 0.2]}, OTHER], **BOTH),
        "nuslerp of rows": file("nuslerp", [HALF, OTHER], parameters=lines),
        "nuslerp of columns": file("nuslerp", [HALF, OTHER], parameters=columns, **BOTH),
        "multislerp": file("multislerp", [HALF, OTHER, {"weight": 0.3}]),
        "multislerp of changes": file("multislerp", [HALF, OTHER, {"weight": 0.3}], **BOTH),
        "karcher": file("karcher", [{}, {}, {}], parameters={"max_iter": 1000, "tol": 1e-7}),
        "model_stock": file("model_stock", [{}, {}, {}], **BOTH),
        "model_stock of rows": file("model_stock", [{}, {}, {}], parameters={"filter_wise": True}, **BOTH),
        "sce": file("sce", [{}, {}, {}], parameters={"select_topk": 0.5}, **BOTH),
        "linear of adapters": file("linear", [HALF, OTHER], lora),
        "task_arithmetic of adapters": file(
            "task_arithmetic", [{"weight": [0, 1, 0.5]}, OTHER], lora, **BOTH
        ),
        "ties of adapters": file("ties", trimmed[:2], lora, **BOTH),
        "breadcrumbs of adapters": file("breadcrumbs", bands, lora, **BOTH),
        "nuslerp of adapters": file("nuslerp", [HALF, OTHER], lora, **BOTH),
        "model_stock of adapters": file("model_stock", [{}, {}], lora, **BOTH),
        "sce of adapters": file("sce", [{}, {}, {}], lora, parameters={"select_topk": 0.5}, **BOTH),
    }


def make(folder: Path) -> None:
    """Writes the models, the adapters, and what mergekit makes of each configuration."""
    import torch
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 40, "intermediate_size": 60, "num_hidden_layers": 4}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    for value in base.parameters():
        value.data.normal_(std=0.3)
    base.save_pretrained(folder / "base")
    targets = ["q_proj", "o_proj", "down_proj"]
    for name in "abc":
        tuned = LlamaForCausalLM.from_pretrained(folder / "base")
        for value in tuned.parameters():
            value.data.add_(0.2 * torch.randn_like(value))
        tuned.save_pretrained(folder / f"full-{name}")
        fresh = LlamaForCausalLM.from_pretrained(folder / "base")
        adapted = get_peft_model(
            fresh, LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
        )
        for key, value in adapted.named_parameters():
            if "lora_" in key:
                value.data.normal_(std=0.4)
        adapted.save_pretrained(folder / f"lora-{name}")
    os.chdir(folder)
    options = MergeOptions(lora_merge_cache="cache", copy_tokenizer=False, write_model_card=False, quiet=True)
    for name, value in files().items():
        run_merge(MergeConfiguration.model_validate(value), f"mergekit, {name}", options)


def main(python: str) -> int:
    """0 if every file gives mergekit's tensors."""
    from click.testing import CliRunner
    from safetensors.numpy import load_file

    import adapterpack
    from adapterpack.cli.commands.compose import command

    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([python, __file__, "--make", scratch], check=True, stdout=subprocess.DEVNULL)
        os.chdir(scratch)
        base = load_file("base/model.safetensors")
        for number, (name, value) in enumerate(files().items()):
            out = f"out-{number}"
            Path("file.yaml").write_text(yaml.safe_dump(value))
            of_adapters, cut = "of adapters" in name, value["merge_method"] in {"ties", "breadcrumbs", "sce"}
            options = ["--rank", "40"] if of_adapters and cut else []
            result = CliRunner().invoke(command, ["file.yaml", "-o", out, *options])
            if result.exit_code:
                raise SystemExit(f"{name}: {result.output} {result.exception}")
            if of_adapters:
                adapterpack.merge("base", [out], out := f"{out}-merged", durable=False)
            found = load_file(f"{out}/model.safetensors")
            wanted = load_file(f"mergekit, {name}/model.safetensors")
            error = max(float(np.abs(found[key] - wanted[key]).max()) for key in wanted)
            moved = max(float(np.abs(base[key] - wanted[key]).max()) for key in wanted)
            wrong += not (error <= CLOSE < moved and found.keys() == wanted.keys())
            word = "ok" if error <= CLOSE else "WRONG"
            sys.stdout.write(f"{word:6}mergekit, {name}: error {error:.1e}, changed by {moved:.1e}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(make(Path(sys.argv[2])) if sys.argv[1] == "--make" else main(sys.argv[1]))
