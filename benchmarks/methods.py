"""Every method on one small real task, beside PEFT's implementation of it: accuracy, parameters, file size, step time, memory.

The task is the support tickets of the examples (6 classes) on MiniLM, with every linear layer adapted and a trained head (`peers.py`).
Steps are taken in turn in one process, forward, backward and AdamW, after warm-up steps that are not counted; the ratio is the median over
pairs of steps, PEFT's time by ours, so that what else the machine does meets both. Memory is what the resident set grows by above the model
and its adapter over three steps (the high-water mark), each side in a process of its own. Accuracies are on held-out rows, mean and spread
over seeds.

    python benchmarks/methods.py                                  # all methods, without training
    python benchmarks/methods.py --methods lora ia3 --json
    python benchmarks/methods.py --seeds 3 --keep rows.jsonl --markdown docs/methods-benchmark.md

With `--keep` each method's row is appended to a file, and a method that the file has is not measured again: a long run can be broken off.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import peers
import torch
import transformers
from peers import HEAD, RATES, Task

from adapterpack import methods, save
from adapterpack.errors import AdapterpackError
from adapterpack.methods import Method
from adapterpack.pack.pack import Pack

SIDES = ("adapterpack", "peft")
BEYOND = 0.05
"""How much slower than PEFT's a step may be before it is named."""
FAULTS = (AdapterpackError, ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError, ImportError)
"""What a method that a model cannot take raises: prompts of PEFT's on an encoder, butterflies that want a CUDA extension, ..."""


def trainable(model: Any) -> int:
    """Parameters of the adapter, without the head."""
    return sum(value.numel() for name, value in model.named_parameters() if value.requires_grad and HEAD not in name)


def size_of(pack: Pack) -> int:
    """Bytes of the adapter's tensors, without the head."""
    adapters = {group.path for group in pack.manifest.groups if group.role != "full"}
    return sum(pack.tensors[name].nbytes for name, entry in pack.manifest.tensors.items() if entry.group in adapters)


def resident_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak(who: str, method: Method, args: argparse.Namespace) -> float:
    """MB above the model and its adapter over three steps of one side in this process."""
    task = Task()
    step = peers.stepper(peers.side(who, task, method, 0), RATES[method.kind])
    batch = next(iter(task.batches(0, args.batch)))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark counts from here on
    before = resident_mb("VmRSS")
    for _ in range(3):
        step(batch)
    return resident_mb("VmHWM") - before


def peak_apart(who: str, method: Method, args: argparse.Namespace) -> float | None:
    """:func:`peak` in a process of its own; None where there is no such count."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-W", "ignore", __file__, "--methods", method.name, "--batch", str(args.batch), "--peak-of", who]
    # Memory that is given back at once where it is freed: else the allocator's own habits are what is measured.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1])


def trained(task: Task, method: Method, who: str, seed: int, args: argparse.Namespace) -> float:
    made = peers.side(who, task, method, seed)
    step = peers.stepper(made, RATES[method.kind])
    for epoch in range(args.epochs):
        for batch in task.batches(1000 * seed + epoch, args.batch):
            step(batch)
    return task.accuracy(made)


def against(task: Task, method: Method) -> tuple[peers.Side | None, str | None]:
    """PEFT's side, which has taken a step; or why there is none."""
    try:
        side = peers.theirs(task, method, 0)
        peers.stepper(side, 0.0)(next(iter(task.batches(0, 2))))
    except FAULTS as error:
        return None, (str(error) or type(error).__name__).partition("\n")[0]
    return side, None


def timed(made: dict[str, peers.Side], batch: peers.Batch, rate: float, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step of each side, taken in turn."""
    steps = {who: peers.stepper(side, rate) for who, side in made.items()}
    times: dict[str, list[float]] = {who: [] for who in steps}
    for run in range(args.warm_up + args.runs):
        for who in list(steps) if run % 2 else reversed(steps):  # neither always goes first
            started = time.perf_counter()
            steps[who](batch)
            if run >= args.warm_up:
                times[who].append(time.perf_counter() - started)
    return times


def measure(task: Task, method: Method, args: argparse.Namespace) -> dict[str, Any]:
    made = {"adapterpack": peers.side("adapterpack", task, method, 0)}
    with tempfile.TemporaryDirectory() as scratch:
        size = size_of(save(made["adapterpack"][0], Path(scratch) / "pack", base=task.base))
    row: dict[str, Any] = {"method": method.name, "trainable": trainable(made["adapterpack"][0]), "bytes": size}
    peer, row["without_peft"] = against(task, method)
    if peer is not None:
        made["peft"] = peer
    times = timed(made, next(iter(task.batches(0, args.batch))), RATES[method.kind], args)
    for who in made:
        row[who] = {"step_ms": 1000 * median(times[who]), "peak_mb": peak_apart(who, method, args) if args.memory else None}
        if args.seeds:
            row[who]["accuracy"] = [trained(task, method, who, seed, args) for seed in range(args.seeds)]
    row["ratio"] = row["ratio_memory"] = None
    if peer is not None:
        row["ratio"] = median(theirs / ours for ours, theirs in zip(times["adapterpack"], times["peft"], strict=True))
        if row["peft"]["peak_mb"] is not None:
            row["ratio_memory"] = row["peft"]["peak_mb"] / row["adapterpack"]["peak_mb"]
    return row


def scored(figure: dict[str, Any]) -> str:
    """Mean and spread (half the range) of the accuracies."""
    values = figure.get("accuracy")
    return f"{mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}" if values else ""


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table, as text."""
    sides = [row.get(who) or {} for who in SIDES]
    return [row["method"], f"{row['trainable']:,}", f"{row['bytes']:,}", *(scored(side) or "-" for side in sides),
            *(f"{side['step_ms']:.0f}" if side else "-" for side in sides), f"{row['ratio']:.2f}" if row["ratio"] else "-",
            *(f"{side['peak_mb']:.0f}" if side and side["peak_mb"] is not None else "-" for side in sides),
            f"{row['ratio_memory']:.2f}" if row["ratio_memory"] else "-"]


COLUMNS = ("method", "parameters", "bytes", "accuracy", "PEFT's", "step, ms", "PEFT's", "PEFT / ours",
           "memory, MB", "PEFT's", "PEFT / ours")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = {row["method"]: row["ratio"] for row in rows if row["ratio"] is not None}
    memory = [row["ratio_memory"] for row in rows if row["ratio_memory"] is not None]
    return {"compared": len(ratios), "median_ratio": median(ratios.values()) if ratios else None,
            "slowest_ratio": min(ratios.values(), default=None), "median_ratio_memory": median(memory) if memory else None,
            "beyond": sorted(name for name, ratio in ratios.items() if ratio < 1 / (1 + BEYOND))}


def sentence(found: dict[str, Any]) -> str:
    if not found["compared"]:
        return "PEFT has none of these methods."
    memory = "" if found["median_ratio_memory"] is None else f" Of memory, the median is {found['median_ratio_memory']:.2f}."
    beyond = ", ".join(found["beyond"]) or "none"
    return (f"PEFT's step by ours, {found['compared']} methods: median {found['median_ratio']:.2f}, smallest {found['slowest_ratio']:.2f}; "
            f"more than {BEYOND:.0%} slower than PEFT: {beyond}.{memory}")


def markdown(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The page of the results."""
    reasons = [f"- {row['method']}: {row['without_peft']}" for row in rows if row["without_peft"]]
    table = [f"| {' | '.join(line)} |" for line in (COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *map(cells, rows))]
    trained = f" Accuracy: mean and half the range of {args.seeds} seeds, {args.epochs} epochs of 480 rows, 120 held out."
    return "\n".join([
        "# What each method costs, beside PEFT", "",
        f"Made by `python benchmarks/methods.py`: MiniLM (22 million parameters), {args.batch} rows a step, float32, "
        f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''} of a CPU. Each method as it is by default, at its "
        "default targets (every linear layer, for most), and a trained head. Parameters and bytes are the adapter's, without the head. "
        "Times are medians; the ratio is the median over pairs of steps taken in turn, above 1 where adapterpack is the faster. Memory is "
        f"what a process grows by above the model and its adapter, over three steps."
        f"{trained if args.seeds else ''} No learning rate is tuned.",
        "", sentence(summary(rows)), "", *table, "", *(["Without PEFT's side:", "", *reasons, ""] if reasons else [])])


def rows_of(task: Task, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows, those that are kept first."""
    kept = [json.loads(line) for line in args.keep.read_text().splitlines()] if args.keep and args.keep.exists() else []
    chosen = [methods.get(name) for name in args.methods] or list(methods().values())
    yield from (row for row in kept if row["method"] in {method.name for method in chosen})
    for number, method in enumerate(chosen):
        if method.name in {row["method"] for row in kept}:
            continue
        print(f"  {number + 1}/{len(chosen)} {method.name}", file=sys.stderr, flush=True)
        try:
            row = measure(task, method, args)
        except (AdapterpackError, ValueError) as error:  # a method for decoders, on an encoder
            print(f"  {method.name}: not on this model: {str(error)[:120]}", file=sys.stderr)
            continue
        if args.keep:
            with args.keep.open("a") as file:
                file.write(json.dumps(row) + "\n")
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=[], help="by default all")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=0, help="train so often; 0: no training")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the processes out that measure memory")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="append rows to this file, and measure no method that it has")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page of the results there")
    parser.add_argument("--peak-of", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.peak_of:
        print(peak(args.peak_of, methods.get(args.methods[0]), args))
        return
    rows = []
    for row in rows_of(Task(), args):
        rows.append(row)
        if not args.json:
            why = f"   ({row['without_peft'][:60]})" if row["without_peft"] else ""
            print("  {:24} {:>9} {:>10}   {} {}   {:>5} {:>5} {:>5}   {:>5} {:>5} {:>5}".format(*cells(row)) + why, flush=True)
    rows.sort(key=lambda row: str(row["method"]))
    found = summary(rows)
    if args.json:
        print(json.dumps({"benchmark": "methods", "threads": torch.get_num_threads(), "runs": args.runs, "seeds": args.seeds,
                          "methods": rows, **found}, indent=2))
    else:
        print(sentence(found))
    if args.markdown:
        args.markdown.write_text(markdown(rows, args))


if __name__ == "__main__":
    main()
