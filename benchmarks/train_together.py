"""Several adapters in one run: the peak memory of the process, and the seconds of a step, beside a run of one
adapter.

Each is a LoRA of all linear layers of SmolLM2 that learns the demo's orders. Every run is a process of its
own; its peak is the largest resident size, from the start to the last pack. Steps are counted from the first
one's end.

    python benchmarks/train_together.py
    python benchmarks/train_together.py --counts 1 4 8 --json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def measured(count: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run of ``count`` adapters in this process."""
    from adapterpack import train
    from adapterpack.demos import SMOLLM2, fetch
    from adapterpack.resources import resource

    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        base = fetch(SMOLLM2)
        config = {
            "model_name_or_path": str(base),
            "task": "text-generation",
            "train_file": str(resource("examples/data/orders.train.jsonl")),
            "output_dir": f"{folder}/packs",
            "targets": "all-linear",
            "r": args.rank,
            "per_device_train_batch_size": args.batch,
            "max_length": args.length,
            "max_steps": args.steps,
            "save_strategy": "no",
        }
        names = [f"adapter-{number}" for number in range(count)]
        train(
            {**config, "adapters": [{"name": name, "seed": seed} for seed, name in enumerate(names)]},
            progress=lambda step: ends.append(time.monotonic()),
        )
        held = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    return {
        "adapters": count,
        "peak_mb": round(peak),
        "seconds_a_step": round((ends[-1] - ends[0]) / (len(ends) - 1), 3),
        "base_mb": round(held / 2**20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        print(json.dumps(measured(args.worker, args)))
        return
    same = [
        part
        for name in ("rank", "batch", "length", "steps")
        for part in (f"--{name}", str(getattr(args, name)))
    ]
    found = []
    for count in args.counts:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, "--worker", str(count), *same],
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
        if not args.json:
            one = found[-1]
            print(
                f"{one['adapters']} adapters: at most {one['peak_mb']} MB, {one['seconds_a_step']} s a step; "
                f"the base's file has {one['base_mb']} MB"
            )
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
