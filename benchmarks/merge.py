"""Merging a LoRA into a checkpoint: adapterpack beside PEFT's merge_and_unload + save_pretrained, and ``cp -r`` as the floor.

Each run is a process of its own, the two in turn, after one warm-up each. ``process`` counts from the start of the process to all files
written, imports included; ``work`` counts from the end of the imports. Both read the same base and the same pack.

    python benchmarks/merge.py --size 135m
    python benchmarks/merge.py --model models/SmolLM2-135M --json
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

SIZES = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4},
    "135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
}
LINEAR = ("_proj.weight", ".query.weight", ".key.weight", ".value.weight", ".dense.weight")


def ours(base: str, pack: str, out: str, dtype: str | None) -> float:
    import adapterpack
    from adapterpack.merge.merge import merge

    assert adapterpack.merge
    started = time.perf_counter()
    merge(base, [pack], out, dtype=dtype)
    return time.perf_counter() - started


def peft(base: str, pack: str, out: str, dtype: str | None) -> float:
    import torch
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForCausalLM

    started = time.perf_counter()
    config = json.loads((Path(base) / "config.json").read_text())
    kind = AutoModelForCausalLM if "CausalLM" in str(config.get("architectures")) else AutoModel
    model = kind.from_pretrained(base, dtype=getattr(torch, dtype) if dtype else "auto")
    PeftModel.from_pretrained(model, pack).merge_and_unload().save_pretrained(out)
    return time.perf_counter() - started


def peak_mb() -> float:
    """The largest resident size of this process, mapped files included; ``ru_maxrss`` would count the parent's before ``exec``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


WORKERS = {"adapterpack": ours, "peft": peft}


def build_base(folder: Path, size: str, dtype: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES[size], tie_word_embeddings=True)).to(getattr(torch, dtype)).save_pretrained(folder)


def build_pack(base: Path, folder: Path, rank: int) -> int:
    """A random LoRA at every linear layer, written as a pack; returns the number of sites."""
    from adapterpack.methods import LoRA, Site, get
    from adapterpack.pack import manifest as m
    from adapterpack.pack.checkpoint import Checkpoint
    from adapterpack.pack.pack import build

    checkpoint, rng = Checkpoint(base), np.random.default_rng(0)
    adapters, weights = {}, {}
    for name, info in checkpoint.tensors.items():
        if name.endswith(LINEAR) and len(info.shape) == 2:
            site = Site(name.removesuffix(".weight"), info.shape[1], info.shape[0])
            shapes = {"lora_A": (rank, site.in_features), "lora_B": (site.out_features, rank)}
            adapters[site] = (LoRA(r=rank), {key: rng.normal(0, 0.02, shape).astype(np.float32) for key, shape in shapes.items()})
            weights[site.path] = name
    task = m.Task("text-generation")
    pack_base = m.Base("base", None, None, structure=checkpoint.structure, content=checkpoint.content)
    build("bench", get("lora"), adapters, task=task, base=pack_base, weights=weights).write(folder)
    return len(adapters)


def once(who: str, base: Path, pack: Path, out: Path, dtype: str | None) -> dict[str, float]:
    """One run in a fresh process."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--worker", who, "--paths", str(base), str(pack), str(out), *(["--dtype", dtype] if dtype else [])]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    process = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.stderr)
    return {"process": process, **json.loads(done.stdout.splitlines()[-1])}


def copy(base: Path, out: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    return time.perf_counter() - started


def largest_difference(one: Path, other: Path) -> float:
    from adapterpack.pack.checkpoint import Checkpoint

    a, b = Checkpoint(one), Checkpoint(other)
    return max(float(np.abs(a.read(name).astype(np.float32) - b.read(name).astype(np.float32)).max()) for name in a.tensors)


def measure(base: Path, work: Path, runs: int, rank: int, dtype: str | None) -> dict[str, Any]:
    sites = build_pack(base, work / "pack", rank)
    outs = {who: work / who for who in WORKERS}
    results: dict[str, list[dict[str, float]]] = {who: [] for who in WORKERS}
    copies = []
    for run in range(runs + 1):
        for who, out in outs.items():
            result = once(who, base, work / "pack", out, dtype)
            if run:  # the first of each warms the file cache
                results[who].append(result)
        copies.append(copy(base, work / "copy"))
    figures = {who: {key: median(result[key] for result in found) for key in found[0]} for who, found in results.items()}
    return {
        "benchmark": "merge",
        "base": base.name,
        "bytes": sum(path.stat().st_size for path in base.glob("*.safetensors")),
        "sites": sites,
        "rank": rank,
        "dtype": dtype,
        "runs": runs,
        "cp_seconds": median(copies[1:]),
        **figures,
        "ratio_process": figures["peft"]["process"] / figures["adapterpack"]["process"],
        "ratio_work": figures["peft"]["work"] / figures["adapterpack"]["work"],
        "largest_difference": largest_difference(outs["adapterpack"], outs["peft"]),
    }


def show(result: dict[str, Any]) -> None:
    size = result["bytes"] / 1e6
    print(f"{result['base']}: {size:.0f} MB, {result['sites']} sites, rank {result['rank']}; median of {result['runs']}")
    for who in WORKERS:
        r = result[who]
        print(f"  {who:12} process {r['process']:6.2f} s   work {r['work']:6.2f} s   peak {r['peak_mb']:5.0f} MB")
    print(f"  {'cp -r':12} {result['cp_seconds']:14.2f} s")
    print(f"  ratio (PEFT / adapterpack): process {result['ratio_process']:.1f}, work {result['ratio_work']:.1f}")
    print(f"  largest difference between the two outputs: {result['largest_difference']:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; by default a random Llama is built")
    parser.add_argument("--size", choices=SIZES, default="135m")
    parser.add_argument("--built-dtype", choices=("float32", "bfloat16"), default="float32", help="the dtype of the Llama that is built")
    parser.add_argument("--dtype", help="the dtype of the output")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--paths", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work = WORKERS[args.worker](*args.paths, args.dtype)
        print(json.dumps({"work": work, "peak_mb": peak_mb()}))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = args.model or Path(folder) / f"llama-{args.size}"
        if args.model is None:
            build_base(base, args.size, args.built_dtype)
        result = measure(base, Path(folder), args.runs, args.rank, args.dtype)
    print(json.dumps(result, indent=2)) if args.json else show(result)


if __name__ == "__main__":
    main()
