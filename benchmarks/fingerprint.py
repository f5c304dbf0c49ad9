"""The content fingerprint of a base beside ``sha256sum`` over the same files, in turn, from the start of each
process to its end.

The base is made of random bytes, in tensors of a Llama's proportions, in two shards. ``ratio`` above 1 means
that adapterpack is faster; ``ratio_one_thread`` gives adapterpack one thread, as sha256sum has.
``ratio_both`` compares the two digests that a pack records of its base, of the files and of the contents,
asked one after the other with both asked at once.

    python benchmarks/fingerprint.py --size 2e9
    python benchmarks/fingerprint.py --size 2e9 --runs 7 --folder /scratch --json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

BLOCK = 1 << 24


def tensors(size: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """A Llama's tensors in bfloat16, of about ``size`` bytes in all: an embedding and as many layers as fit
    beside it.
    """
    hidden = 2048 if size >= 1e9 else 512
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (4 * hidden, hidden),
        "mlp.up_proj": (4 * hidden, hidden),
        "mlp.down_proj": (hidden, 4 * hidden),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    a_layer = 2 * sum(int(np.prod(shape)) for shape in layer.values())
    layers = max(1, round(0.88 * size / a_layer))
    rows = max(1, (int(size) - layers * a_layer) // (2 * hidden))
    found: list[tuple[str, str, tuple[int, ...]]] = [("model.embed_tokens.weight", "BF16", (rows, hidden))]
    return found + [
        (f"model.layers.{i}.{name}.weight", "BF16", shape)
        for i in range(layers)
        for name, shape in layer.items()
    ]


def build(folder: Path, size: int) -> None:
    from adapterpack.io.safetensors import plan

    folder.mkdir()
    rng, everything = np.random.default_rng(0), tensors(size)
    half = len(everything) // 2
    weight_map = {}
    for shard, held in (
        ("model-00001-of-00002.safetensors", everything[:half]),
        ("model-00002-of-00002.safetensors", everything[half:]),
    ):
        header, places = plan(held, {"format": "pt"})
        left = sum(info.nbytes for info in places.values())
        with (folder / shard).open("wb") as file:
            file.write(header)
            while left:
                left -= file.write(rng.bytes(min(left, BLOCK)))
        weight_map |= dict.fromkeys(places, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def worker(folder: str, levels: str) -> None:
    """What is measured: opening the base and hashing it, for the content alone or for the files, too."""
    from adapterpack.base.checkpoint import Checkpoint

    started, base = time.perf_counter(), Checkpoint(folder)
    if levels == "apart":
        _ = base.file_entries
    content = base.fingerprint(files=True).content if levels == "both" else base.content
    work = time.perf_counter() - started
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    print(json.dumps({"content": content, "work": work, "peak_mb": peak}))


def timed(command: list[str], **keys: Any) -> tuple[float, str]:
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, **keys)
    return time.perf_counter() - started, done.stdout


def one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def measure(folder: Path, runs: int) -> dict[str, Any]:
    shards = sorted(map(str, folder.glob("*.safetensors")))
    ours = [sys.executable, __file__, "--worker", str(folder)]
    contestants: dict[str, Callable[[], tuple[float, str]]] = {
        "sha256sum": lambda: timed(["sha256sum", *shards]),
        "adapterpack": lambda: timed(ours),
        "one_thread": lambda: timed(ours, preexec_fn=one_core),
        "apart": lambda: timed([*ours, "--levels", "apart"]),
        "both": lambda: timed([*ours, "--levels", "both"]),
    }
    seconds: dict[str, list[float]] = {who: [] for who in contestants}
    answers: dict[str, set[str]] = {who: set() for who in contestants}
    peaks, works = [], []
    for run in range(runs + 1):
        for who, contestant in contestants.items():
            took, said = contestant()
            if who != "sha256sum":
                found = json.loads(said)
                answers[who].add(found["content"])
                if run:
                    peaks.append(found["peak_mb"])
                    works += [found["work"]] if who == "adapterpack" else []
            if run:  # the first of each warms the file cache
                seconds[who].append(took)
    assert len(set().union(*answers.values())) == 1
    size = sum(Path(shard).stat().st_size for shard in shards)
    medians = {who: median(found) for who, found in seconds.items()}
    return {
        "benchmark": "fingerprint",
        "bytes": size,
        "tensors": len(tensors(size)),
        "runs": runs,
        "cores": len(os.sched_getaffinity(0)),
        "seconds": medians,
        "gb_per_second": {who: size / 1e9 / found for who, found in medians.items()},
        "work_seconds": median(works),
        "ratio": medians["sha256sum"] / medians["adapterpack"],
        "ratio_one_thread": medians["sha256sum"] / medians["one_thread"],
        "ratio_both": medians["apart"] / medians["both"],
        "peak_mb": max(peaks),
    }


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['bytes'] / 1e9:.2f} GB, {result['tensors']} tensors; median of {result['runs']}, "
        f"{result['cores']} cores"
    )
    for who, seconds in result["seconds"].items():
        print(f"  {who:12} {seconds:6.2f} s   {result['gb_per_second'][who]:5.2f} GB/s")
    print(
        f"  speed against sha256sum: {result['ratio']:.2f}, with one thread {result['ratio_one_thread']:.2f}"
    )
    print(f"  files and contents at once against one after the other: {result['ratio_both']:.2f}")
    print(f"  peak resident {result['peak_mb']:.0f} MB, the interpreter included")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=float, default=2e9, help="bytes of the base")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the base is built, and removed afterwards")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--levels", default="content", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.levels)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        build(Path(folder) / "base", int(args.size))
        result = measure(Path(folder) / "base", args.runs)
    print(json.dumps(result, indent=2)) if args.json else show(result)


if __name__ == "__main__":
    main()
