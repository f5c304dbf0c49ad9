"""Composing two LoRA adapters to one of a given rank: adapterpack beside PEFT's add_weighted_adapter.

Both combine the same tensors to the best approximation of the same rank, in turns. Four ways to look at it:

- ``call``: two function calls in one process, on adapters in memory. Ours also seals the result into a pack.
- ``process``: ours is the command line from the start of the process to its end: interpreter, imports,
  reading and checking two folders, composing, hashing, writing and syncing a new one. Of PEFT only the call
  is counted, on a model that is loaded.
- ``wide``: the command line on two adapters of all linear layers of a 7B model (4096 and 11008 wide), with
  its peak of memory. PEFT is timed at one site of each of two shapes, 4096 x 4096 and 11008 x 4096, and its
  seconds for the 224 sites follow from those.
- ``ties``: as ``process``, of TIES on the dense changes (PEFT's ``ties_svd``), with weights of 1, where both
  have the same formula. The errors are those from the whole dense result, beside the least that any adapter
  of that rank can have.

    python benchmarks/compose.py --size tiny
    python benchmarks/compose.py --mode process --size 135m --rank 16 --json
    python benchmarks/compose.py --mode wide --rank 64
    python benchmarks/compose.py --mode ties --size 135m --rank 16 --repeat 1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import safetensors.numpy
import torch
import transformers

import adapterpack

SIZES = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
WEIGHTS = [0.7, -0.4]


def random_model(size: str, rank: int) -> Any:
    """A Llama of that size with random weights and two adapters, whose B is not left at zero."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=256, **SIZES[size])  # the embedding takes no part
    model = transformers.LlamaForCausalLM(config)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), adapter_name="a"
    )
    model.add_adapter("b", peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data = 0.1 * torch.randn_like(value)
    return model


def largest_difference(model: Any, pack: adapterpack.Pack) -> float:
    """Between the changes of PEFT's adapter ``peft`` and of the pack, over all sites, relative to the largest
    entry.
    """
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("peft").detach().numpy()
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    differences, sizes = [0.0], [0.0]
    for adapter in pack.adapters():
        ours = adapter.config.scale * adapter.params["lora_B"] @ adapter.params["lora_A"]
        differences.append(float(np.abs(ours - deltas[adapter.site.path]).max()))
        sizes.append(float(np.abs(ours).max()))
    return max(differences) / max(sizes)


def measure(size: str, rank: int, repeat: int) -> dict[str, Any]:
    """The median seconds of both over ``repeat`` turns after one that is not counted, and how far the results
    differ.
    """
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


LAUNCHER = """
import os, sys, time
start = time.perf_counter()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)])
_, status, used = os.wait4(pid, 0)
print(time.perf_counter() - start, used.ru_maxrss * 1024, os.waitstatus_to_exitcode(status))
"""
"""A small process between this one and ours: a peak of memory begins with that of the process that starts
another.
"""


def command(arguments: list[str], scratch: Path) -> tuple[float, int]:
    """Seconds of a process of ``adapterpack``, and its peak of memory in bytes. As in an installed package,
    its bytecode is kept.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment |= {
        "PYTHONPATH": str(Path(adapterpack.__file__).parents[1]),
        "PYTHONPYCACHEPREFIX": str(scratch / "bytecode"),
    }
    started = [sys.executable, "-c", LAUNCHER, sys.executable, "-m", "adapterpack", *arguments]
    seconds, peak, code = subprocess.run(
        started, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    if code != "0":
        raise SystemExit(f"adapterpack ended with {code}")
    return float(seconds), int(peak)


def composing(
    scratch: Path, turn: int, rank: int, *more: str, weights: Sequence[float] = WEIGHTS
) -> tuple[float, int]:
    """One run of the command line on the two adapters in ``scratch``."""
    weighted = [argument for weight in weights for argument in ("--weight", str(weight))]
    return command(
        [
            "compose",
            str(scratch / "a"),
            str(scratch / "b"),
            "-o",
            str(scratch / f"out{turn}"),
            "--rank",
            str(rank),
            *weighted,
            *more,
        ],
        scratch,
    )


def error_of_truth(scratch: Path, rank: int, stride: int) -> float:
    """The largest relative Frobenius error of every ``stride``-th site from the truncated SVD of the dense
    change, in float64.
    """
    parents = [list(adapterpack.load(scratch / name).adapters())[::stride] for name in ("a", "b")]
    errors = []
    for found, *terms in zip(
        list(adapterpack.load(scratch / "out0").adapters())[::stride], *parents, strict=True
    ):
        factors = [
            (each.params["lora_B"].astype(np.float64), each.params["lora_A"].astype(np.float64))
            for each in (found, *terms)
        ]
        scales = [
            found.config.scale,
            *(weight * term.config.scale for weight, term in zip(WEIGHTS, terms, strict=True)),
        ]
        ours, *dense = [scale * B @ A for scale, (B, A) in zip(scales, factors, strict=True)]
        U, S, Vt = np.linalg.svd(sum(dense), full_matrices=False)
        truth = (U[:, :rank] * S[:rank]) @ Vt[:rank]
        errors.append(float(np.linalg.norm(ours - truth) / np.linalg.norm(truth)))
    return max(errors)


def measure_process(size: str, rank: int, repeat: int) -> dict[str, Any]:
    """The median seconds of our whole process and of PEFT's call alone, over ``repeat`` turns after one that
    is not counted.
    """
    model = random_model(size, rank)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model.save_pretrained(folder, save_embedding_layers=False)
        for turn in range(repeat + 1):
            ours.append(composing(scratch, turn, rank)[0])
            if turn:
                model.delete_adapter("peft")
            start = time.perf_counter()
            model.add_weighted_adapter(["a", "b"], WEIGHTS, "peft", combination_type="svd", svd_rank=rank)
            theirs.append(time.perf_counter() - start)
        error = error_of_truth(scratch, rank, 13)
        composed = adapterpack.load(scratch / "out0")
    medians = {"adapterpack": statistics.median(ours[1:]), "peft": statistics.median(theirs[1:])}
    return {
        "benchmark": "compose",
        "mode": "process",
        "size": size,
        "rank": rank,
        "sites": len(list(composed.adapters())),
        "repeat": repeat,
        "threads": torch.get_num_threads(),
        "seconds": medians,
        "ratio": medians["peft"] / medians["adapterpack"],
        "largest_relative_difference": largest_difference(model, composed),
        "error_of_truncated_svd": error,
    }


DENSITY = 0.2


def ties_of(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """TIES of two dense changes by its formula (arXiv 2306.01708), trimmed at each site, with weights of 1;
    float64.
    """
    trimmed = []
    for change in (one, two):
        sizes = np.abs(change.astype(np.float32))
        least = np.partition(sizes.ravel(), -round(DENSITY * change.size))[-round(DENSITY * change.size)]
        trimmed.append(np.where(sizes >= least, change, 0))
    both = np.stack(trimmed)
    agree = np.sign(both) == np.sign(both.sum(axis=0))
    merged: np.ndarray = (both * agree).sum(axis=0) / np.maximum(1, (agree & (both != 0)).sum(axis=0))
    return merged


def errors_of_ties(model: Any, scratch: Path, rank: int, stride: int) -> dict[str, float]:
    """The mean relative Frobenius errors of ours and of PEFT's from the dense TIES, at every ``stride``-th
    site, and the least ones.
    """
    parents = [list(adapterpack.load(scratch / name).adapters())[::stride] for name in ("a", "b")]
    theirs = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    errors = []
    for found, *terms in zip(
        list(adapterpack.load(scratch / "out0").adapters())[::stride], *parents, strict=True
    ):
        ours, *dense = [
            each.config.scale * each.params["lora_B"].astype(np.float64) @ each.params["lora_A"]
            for each in (found, *terms)
        ]
        truth = ties_of(*dense)
        S = np.linalg.svd(truth, compute_uv=False)
        peers = theirs[found.site.path].get_delta_weight("peft").detach().numpy().astype(np.float64)
        errors.append(
            [np.linalg.norm(ours - truth), np.linalg.norm(peers - truth), np.linalg.norm(S[rank:])]
            / np.linalg.norm(truth)
        )
    return dict(zip(("adapterpack", "peft", "least"), np.mean(errors, axis=0).tolist(), strict=True))


def measure_ties(size: str, rank: int, repeat: int) -> dict[str, Any]:
    """As :func:`measure_process`, of TIES."""
    model = random_model(size, rank)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model.save_pretrained(folder, save_embedding_layers=False)
        for turn in range(repeat + 1):
            ours.append(
                composing(
                    scratch,
                    turn,
                    rank,
                    "--rule",
                    "ties",
                    "--param",
                    f"density={DENSITY}",
                    "--param",
                    "scope=tensor",
                    weights=(1, 1),
                )[0]
            )
            if turn:
                model.delete_adapter("peft")
            start = time.perf_counter()
            model.add_weighted_adapter(
                ["a", "b"], [1.0, 1.0], "peft", combination_type="ties_svd", svd_rank=rank, density=DENSITY
            )
            theirs.append(time.perf_counter() - start)
        errors = errors_of_ties(model, scratch, rank, 13)
        sites = len(list(adapterpack.load(scratch / "out0").adapters()))
    medians = {"adapterpack": statistics.median(ours[1:]), "peft": statistics.median(theirs[1:])}
    return {
        "benchmark": "compose",
        "mode": "ties",
        "size": size,
        "rank": rank,
        "sites": sites,
        "repeat": repeat,
        "threads": torch.get_num_threads(),
        "seconds": medians,
        "ratio": medians["peft"] / medians["adapterpack"],
        "errors": errors,
    }


WIDE = {
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
WIDE_LAYERS = 32


def write_wide(folder: Path, rank: int, seed: int) -> None:
    """A folder as PEFT writes it, of random factors for every linear layer of a 7B model."""
    rng, tensors = np.random.default_rng(seed), {}
    for layer in range(WIDE_LAYERS):
        for name, (m, n) in WIDE.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = rng.standard_normal((rank, n), np.float32) / 64
            tensors[f"{path}.lora_B.weight"] = rng.standard_normal((m, rank), np.float32) / 64
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in WIDE}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def seconds_of_peft(shape: tuple[int, int], rank: int) -> float:
    """PEFT's seconds for one site of a shape ``(out, in)``."""
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False)),
        peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]),
        adapter_name="a",
    )
    model.add_adapter("b", peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]))
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = torch.randn_like(value) / 64
    start = time.perf_counter()
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "peft", combination_type="svd", svd_rank=rank)
    return time.perf_counter() - start


def measure_wide(rank: int, repeat: int) -> dict[str, Any]:
    """The median seconds and the peak of memory of our process for the whole model, and PEFT's seconds for
    one site of every shape.
    """
    sites = WIDE_LAYERS * len(WIDE)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for seed, name in enumerate(("a", "b")):
            write_wide(scratch / name, rank, seed)
        runs = [composing(scratch, turn, rank) for turn in range(repeat + 1)][1:]
    shapes = {
        shape: seconds_of_peft(shape, rank) for shape in {(max(shape), min(shape)) for shape in WIDE.values()}
    }
    theirs = WIDE_LAYERS * sum(shapes[max(shape), min(shape)] for shape in WIDE.values())
    ours = statistics.median(seconds for seconds, _ in runs)
    return {
        "benchmark": "compose",
        "mode": "wide",
        "size": "7b",
        "rank": rank,
        "sites": sites,
        "repeat": repeat,
        "threads": torch.get_num_threads(),
        "seconds": {
            "adapterpack": ours,
            **{f"peft, one {m} x {n}": one for (m, n), one in sorted(shapes.items())},
            "peft, all sites by these": theirs,
        },
        "ratio": theirs / ours,
        "peak_bytes": max(peak for _, peak in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", choices=("call", "process", "ties", "wide"), default="call")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.mode == "wide":
        result = measure_wide(arguments.rank, arguments.repeat)
    else:
        modes = {"call": measure, "process": measure_process, "ties": measure_ties}
        result = modes[arguments.mode](arguments.size, arguments.rank, arguments.repeat)
    if arguments.json:
        print(json.dumps(result))
        return
    print(
        f"two adapters of rank {result['rank']} at {result['sites']} sites, to rank {result['rank']}; "
        f"{result['threads']} threads"
    )
    for name, seconds in result["seconds"].items():
        print(f"  {name:24} {seconds * 1000:12.1f} ms")
    print(f"  PEFT takes {result['ratio']:.1f} times as long")
    for name, said in {
        "largest_relative_difference": "the changes differ by {:.1e} at most",
        "error_of_truncated_svd": "ours is within {:.1e} of the truncated SVD of the dense change",
        "errors": (
            "relative errors: {adapterpack:.6f} ours, {peft:.6f} PEFT's, {least:.6f} the least there can be"
        ),
        "peak_bytes": "ours holds {:.3g} bytes at most",
    }.items():
        if name in result:
            print(
                "  "
                f"{said.format(**result[name]) if isinstance(result[name], dict) else said.format(result[name])}"
            )


if __name__ == "__main__":
    main()
