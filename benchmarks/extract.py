"""Extracting a LoRA from a fine-tuned checkpoint: adapterpack beside the SVD of every difference in torch.

Both begin with two checkpoints on disk and end with the factors of every linear layer in memory; they run in
turns in one process. The peer does what extraction scripts do: reads both tensors, subtracts,
torch.linalg.svd in float32, keeps the first values. Ours also compares every byte of all other tensors, finds
the rank and measures the error, and seals a pack (the base's digest is part of the time).

    python benchmarks/extract.py --layers 1
    python benchmarks/extract.py --layers 30 --repeat 1 --json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import adapterpack
from adapterpack.io import safetensors
from adapterpack.io.safetensors import DTYPES, SafetensorsFile

SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
"""Those of a layer of SmolLM2-135M."""


def checkpoints(folder: Path, layers: int, rank: int) -> tuple[Path, Path]:
    """A random base in bfloat16, and the same with a change of that rank merged into every matrix."""
    rng = np.random.default_rng(0)
    base, tuned = {}, {}
    for layer in range(layers):
        for name, (rows, columns) in SHAPES.items():
            weight = (0.02 * rng.standard_normal((rows, columns))).astype(DTYPES["BF16"])
            change = (
                0.01
                / math.sqrt(rank)
                * rng.standard_normal((rows, rank))
                @ rng.standard_normal((rank, columns))
            )
            base[f"model.layers.{layer}.{name}.weight"] = weight
            tuned[f"model.layers.{layer}.{name}.weight"] = (weight.astype(np.float32) + change).astype(
                DTYPES["BF16"]
            )
    for name, tensors in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir()
        safetensors.write(folder / name / "model.safetensors", tensors)
        (folder / name / "config.json").write_text(
            '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
        )
    return folder / "base", folder / "tuned"


def by_torch(tuned: Path, base: Path, rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    files = [SafetensorsFile(folder / "model.safetensors") for folder in (tuned, base)]
    found = {}
    for name in files[0].tensors:
        one, two = (
            torch.from_numpy(file.read(name).view(np.int16).copy()).view(torch.bfloat16).float()
            for file in files
        )
        u, values, vt = torch.linalg.svd(one - two, full_matrices=False)
        halves = values[:rank].sqrt()
        found[name] = (u[:, :rank] * halves, halves[:, None] * vt[:rank])
    return found


def measure(layers: int, rank: int, repeat: int) -> dict[str, Any]:
    """The median seconds of both over ``repeat`` turns after one that is not counted, and how far the results
    differ.
    """
    times: dict[str, list[float]] = {"adapterpack": [], "torch": []}
    with tempfile.TemporaryDirectory() as scratch:
        base, tuned = checkpoints(Path(scratch), layers, rank)
        for turn in range(repeat + 1):
            start = time.perf_counter()
            pack = adapterpack.extract(tuned, base)
            ours = time.perf_counter() - start
            start = time.perf_counter()
            theirs = by_torch(tuned, base, rank)
            if turn:
                times["adapterpack"].append(ours)
                times["torch"].append(time.perf_counter() - start)
        difference = size = 0.0
        for adapter in pack.adapters():
            B, A = theirs[f"{adapter.site.path}.weight"]
            wanted = (B @ A).numpy()
            difference += float(
                np.linalg.norm(adapter.params["lora_B"] @ adapter.params["lora_A"] - wanted) ** 2
            )
            size += float(np.linalg.norm(wanted) ** 2)
    medians = {name: statistics.median(values) for name, values in times.items()}
    story = pack.manifest.extensions["x_extract"]
    return {
        "benchmark": "extract",
        "layers": layers,
        "matrices": len(theirs),
        "rank": rank,
        "repeat": repeat,
        "threads": torch.get_num_threads(),
        "seconds": medians,
        "ratio": medians["torch"] / medians["adapterpack"],
        "ranks_found": sorted(set(story["detected"].values())),
        "relative_error": story["truncation"]["total"],
        "relative_difference": math.sqrt(difference / size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    result = measure(arguments.layers, arguments.rank, arguments.repeat)
    if arguments.json:
        print(json.dumps(result))
        return
    print(
        f"a change of rank {result['rank']} out of {result['matrices']} matrices; {result['threads']} threads"
    )
    for name, seconds in result["seconds"].items():
        print(f"  {name:12} {seconds * 1000:10.1f} ms")
    print(
        f"  torch takes {result['ratio']:.1f} times as long; ranks found: {result['ranks_found']}; the "
        f"changes differ by {result['relative_difference']:.1e} in the Frobenius norm, of an error of "
        f"{result['relative_error']:.1e}"
    )


if __name__ == "__main__":
    main()
