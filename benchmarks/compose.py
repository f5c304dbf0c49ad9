"""Composing two LoRA adapters to one of a given rank: adapterpack beside PEFT's add_weighted_adapter(combination_type="svd").

Both combine the same tensors, held in memory, to the best approximation of the same rank; they run in turns in one process. Ours also
seals the result into a pack (its digests are part of the time). The changes of both are compared at every site.

    python benchmarks/compose.py --size tiny
    python benchmarks/compose.py --size 135m --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

import adapterpack

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
}
WEIGHTS = [0.7, -0.4]


def random_model(size: str, rank: int) -> Any:
    """A Llama of that size with random weights and two adapters, whose B is not left at zero."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=256, **SIZES[size])  # the embedding takes no part
    model = transformers.LlamaForCausalLM(config)
    model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data = 0.1 * torch.randn_like(value)
    return model


def largest_difference(model: Any, pack: adapterpack.Pack) -> float:
    """Between the changes of PEFT's adapter ``peft`` and of the pack, over all sites, relative to the largest entry."""
    deltas = {name.removeprefix("base_model.model."): module.get_delta_weight("peft").detach().numpy()
              for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.Linear)}
    differences, sizes = [0.0], [0.0]
    for adapter in pack.adapters():
        ours = adapter.config.scale * adapter.params["lora_B"] @ adapter.params["lora_A"]
        differences.append(float(np.abs(ours - deltas[adapter.site.path]).max()))
        sizes.append(float(np.abs(ours).max()))
    return max(differences) / max(sizes)


def measure(size: str, rank: int, repeat: int) -> dict[str, Any]:
    """The median seconds of both over ``repeat`` turns after one that is not counted, and how far the results differ."""
    model = random_model(size, rank)
    times: dict[str, list[float]] = {"adapterpack": [], "peft": []}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        packs = [adapterpack.load(Path(folder) / name) for name in ("a", "b")]
        for turn in range(repeat + 1):
            start = time.perf_counter()
            composed = adapterpack.compose(packs, weights=WEIGHTS, rank=rank)
            ours = time.perf_counter() - start
            if turn:
                model.delete_adapter("peft")
            start = time.perf_counter()
            model.add_weighted_adapter(["a", "b"], WEIGHTS, "peft", combination_type="svd", svd_rank=rank)
            theirs = time.perf_counter() - start
            if turn:
                times["adapterpack"].append(ours)
                times["peft"].append(theirs)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "benchmark": "compose",
        "size": size,
        "rank": rank,
        "sites": len(list(composed.adapters())),
        "repeat": repeat,
        "threads": torch.get_num_threads(),
        "seconds": medians,
        "ratio": medians["peft"] / medians["adapterpack"],
        "largest_relative_difference": largest_difference(model, composed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    result = measure(arguments.size, arguments.rank, arguments.repeat)
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"two adapters of rank {result['rank']} at {result['sites']} sites, to rank {result['rank']}; {result['threads']} threads")
    for name, seconds in result["seconds"].items():
        print(f"  {name:12} {seconds * 1000:10.1f} ms")
    print(f"  PEFT takes {result['ratio']:.1f} times as long; the changes differ by {result['largest_relative_difference']:.1e} at most")


if __name__ == "__main__":
    main()
