"""Every method on one small real task, compared with PEFT's implementation of it: accuracy, parameters, file
size, step time, memory.

The task is the support tickets of the examples (6 classes) on MiniLM, with every linear layer adapted and a
trained head (`peers.py`). Four parts are measured apart from each other, for each method:

- size: the numbers that are trained and the bytes of them in a pack, without the head.
- steps: on the whole model. Steps are taken in turn in one process, forward, backward and AdamW, after
  warm-up steps that are not counted; the ratio is the median over pairs of steps, PEFT's time by ours, so
  that what else the machine does meets both.
- memory: on the whole model. What the resident set grows by above the model and its adapter over three steps
  (the high-water mark), each side in a process of its own.
- accuracy: on the first one of the model's six layers and the first 16 tokens of each row, with a head on the
  mean of the tokens, two epochs in batches of 16, so that 44 methods, two implementations and three seeds are
  trained in half an hour of one core: it compares two implementations, and tells little of how good a method
  can be, since the head learns by itself, too. Both have the same learning rate, which is none that was tuned
  (`peers.py`). Accuracies are on held-out rows, mean and spread over seeds.

    python benchmarks/methods.py                                  # steps and memory of all methods
    python benchmarks/methods.py --methods lora ia3 --parts steps --json
    python benchmarks/methods.py --parts size steps memory accuracy --keep rows.jsonl --markdown
    docs/benchmarks/methods.md

With `--keep` each part of each method is appended to a file, and what the file has is not measured again: a
long run can be broken off, and its parts can be made at different times (`--seconds`).
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
from peers import HEAD, Task

from adapterpack import methods, save
from adapterpack.adapter_methods import Method
from adapterpack.errors import AdapterpackError
from adapterpack.pack.pack import Pack

SIDES = ("adapterpack", "peft")
NAMES = {"adapterpack": "our", "peft": "PEFT's"}
LAYERS, TOKENS, ROWS = 1, 16, 16
"""How much of the model and of each row is trained for the accuracies, and how many rows a step."""
BEYOND = 0.05
"""How much slower than PEFT's a step may be before it is named."""
FAULTS = (
    AdapterpackError,
    ValueError,
    RuntimeError,
    TypeError,
    AttributeError,
    NotImplementedError,
    ImportError,
)
"""What a method that a model cannot take raises: prompts of PEFT's on an encoder, butterflies that want a
CUDA extension, ...
"""


def trainable(model: Any) -> int:
    """Parameters of the adapter, without the head."""
    return sum(
        value.numel() for name, value in model.named_parameters() if value.requires_grad and HEAD not in name
    )


def size_of(pack: Pack) -> int:
    """Bytes of the adapter's tensors, without the head."""
    adapters = {group.path for group in pack.manifest.groups if group.role != "full"}
    return sum(
        pack.tensors[name].nbytes for name, entry in pack.manifest.tensors.items() if entry.group in adapters
    )


def resident_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak(who: str, method: Method, args: argparse.Namespace) -> float:
    """MB above the model and its adapter over three steps of one side in this process."""
    task = Task()
    step = peers.stepper(peers.side(who, task, method, 0), peers.rate_of(method))
    batch = next(iter(task.batches(0, args.batch)))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark counts from here on
    before = resident_mb("VmRSS")
    for _ in range(3):
        step(batch)
    return resident_mb("VmHWM") - before


def peak_apart(who: str, method: Method, args: argparse.Namespace) -> float:
    """:func:`peak` in a process of its own."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--methods",
        method.name,
        "--batch",
        str(args.batch),
        "--peak-of",
        who,
    ]
    # Memory that is given back at once where it is freed: else the allocator's own habits are what is
    # measured.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1])


def usable(who: str, task: Task, method: Method) -> tuple[peers.Side | None, str | None]:
    """One side, which has taken a step that changes nothing; or why there is none."""
    try:
        side = peers.side(who, task, method, 0)
        peers.stepper(side, 0.0)(next(iter(task.batches(0, 2))))
    except FAULTS as error:
        return None, (str(error) or type(error).__name__).partition("\n")[0]
    return side, None


def timed(
    made: dict[str, peers.Side], batch: peers.Batch, rate: float, args: argparse.Namespace
) -> dict[str, list[float]]:
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


def size(task: Task, method: Method, args: argparse.Namespace) -> dict[str, Any]:
    """Trained numbers and bytes of the pack, and why a side cannot be used."""
    found: dict[str, Any] = {}
    for who in SIDES:
        side, found[f"without_{who}"] = usable(who, task, method)
        if side is not None and who == "adapterpack":
            with tempfile.TemporaryDirectory() as scratch:
                found |= {
                    "trainable": trainable(side[0]),
                    "bytes": size_of(save(side[0], Path(scratch) / "pack", base=task.base)),
                }
    return found


def steps(task: Task, method: Method, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a step, and the ratio."""
    made = {who: side for who in SIDES if (side := usable(who, task, method)[0]) is not None}
    times = timed(made, next(iter(task.batches(0, args.batch))), peers.rate_of(method), args)
    return {
        **{who: 1000 * median(each) for who, each in times.items()},
        "ratio": median(theirs / ours for ours, theirs in zip(*(times[who] for who in SIDES), strict=True))
        if len(made) == 2
        else None,
    }


def memory(task: Task, method: Method, args: argparse.Namespace) -> dict[str, Any]:
    """Megabytes, and the ratio."""
    found: dict[str, Any] = {
        who: peak_apart(who, method, args) for who in SIDES if usable(who, task, method)[0] is not None
    }
    return {**found, "ratio": found["peft"] / found["adapterpack"] if len(found) == 2 else None}


def accuracy(task: Task, method: Method, args: argparse.Namespace) -> dict[str, Any]:
    """The held-out accuracies of each seed, and the learning rate."""
    sides = [who for who in SIDES if usable(who, task, method)[0] is not None]
    if not sides:
        return {}
    return {
        "rate": peers.rate_of(method),
        **{
            who: [
                task.accuracy(peers.trained(task, method, who, seed, args.epochs, ROWS))
                for seed in range(args.seeds)
            ]
            for who in sides
        },
    }


PARTS = {"size": size, "steps": steps, "memory": memory, "accuracy": accuracy}


def scored(values: list[float] | None) -> str:
    """Mean and spread (half the range) of the accuracies."""
    return f"{mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}" if values else "-"


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table, as text."""
    size, accuracy = row.get("size", {}), row.get("accuracy", {})
    figures = [
        form.format(value) if (value := row.get(part, {}).get(key)) is not None else "-"
        for part in ("steps", "memory")
        for key, form in (*((who, "{:.0f}") for who in SIDES), ("ratio", "{:.2f}"))
    ]
    return [
        row["method"],
        *(f"{size[key]:,}" if key in size else "-" for key in ("trainable", "bytes")),
        *(scored(accuracy.get(who)) for who in SIDES),
        *figures,
    ]


COLUMNS = (
    "method",
    "parameters",
    "bytes",
    "accuracy",
    "PEFT's",
    "step, ms",
    "PEFT's",
    "PEFT / ours",
    "memory, MB",
    "PEFT's",
    "PEFT / ours",
)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    ratios, memory = (
        {row["method"]: row[part]["ratio"] for row in rows if row.get(part, {}).get("ratio") is not None}
        for part in ("steps", "memory")
    )
    apart = [
        mean(row["accuracy"]["adapterpack"]) - mean(row["accuracy"]["peft"])
        for row in rows
        if all(who in row.get("accuracy", {}) for who in SIDES)
    ]
    return {
        "compared": len(ratios),
        "median_ratio": median(ratios.values()) if ratios else None,
        "slowest_ratio": min(ratios.values(), default=None),
        "median_ratio_memory": median(memory.values()) if memory else None,
        "mean_difference_of_accuracy": mean(apart) if apart else None,
        "beyond": sorted(name for name, ratio in ratios.items() if ratio < 1 / (1 + BEYOND)),
    }


def sentence(found: dict[str, Any]) -> str:
    said = []
    if found["compared"]:
        beyond = ", ".join(found["beyond"]) or "none"
        said.append(
            f"PEFT's step by ours, {found['compared']} methods: median {found['median_ratio']:.2f}, smallest "
            f"{found['slowest_ratio']:.2f}; more than {BEYOND:.0%} slower than PEFT: {beyond}."
        )
    if found["median_ratio_memory"] is not None:
        said.append(f"Of memory, the median is {found['median_ratio_memory']:.2f}.")
    if found["mean_difference_of_accuracy"] is not None:
        said.append(
            f"Our accuracy less PEFT's, mean over methods: {found['mean_difference_of_accuracy']:+.3f}."
        )
    return " ".join(said) or "Nothing was compared."


def markdown(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The page of the results."""
    reasons = {
        who: [
            f"- {row['method']}: {why}" for row in rows if (why := row.get("size", {}).get(f"without_{who}"))
        ]
        for who in SIDES
    }
    table = [
        f"| {' | '.join(line)} |"
        for line in (COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *map(cells, rows))
    ]
    return "\n".join(
        [
            "# What each method costs, compared with PEFT",
            "",
            f"Made by `python benchmarks/methods.py`: MiniLM (22 million parameters), {args.batch} rows a "
            f"step, float32, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''} "
            "of a CPU. Each method as it is by default, at its default targets (every linear layer, for "
            "most), and a trained head. Parameters and bytes are the adapter's, without the head. Times "
            "are medians; the ratio is the median over pairs of steps taken in turn, above 1 where "
            "adapterpack is the faster. Memory is what a process grows by above the model and its adapter, "
            "over three steps.",
            "",
            f"Accuracy (6 classes, 120 rows held out; mean and half the range of {args.seeds} seeds) is of "
            f"{args.epochs} epochs of 480 rows on the first {LAYERS} of the model's 6 layers and {TOKENS} "
            "tokens of each row, under a head on the mean of the tokens, which learns by itself, too: what "
            "two implementations make of the same method, not how good a method can be. Both have the same "
            "learning rate; none is tuned. A sixth is chance. Prompts begin at the same tensors on both "
            "sides, and neither head sees their states, which PEFT would leave in the mean; PEFT's config "
            "of trainable tokens cannot name a head to train, so its head is set to train as well.",
            "",
            sentence(summary(rows)),
            "",
            *table,
            "",
            *(
                line
                for who, why in reasons.items()
                if why
                for line in (f"Without {NAMES[who]} side:", "", *why, "")
            ),
        ]
    )


def rows_of(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row a method: what is kept of it, and what is measured now."""
    rows: dict[str, dict[str, Any]] = {}
    for kept in map(
        json.loads, args.keep.read_text().splitlines() if args.keep and args.keep.exists() else []
    ):
        rows.setdefault(kept.pop("method"), {})[kept.pop("part")] = kept
    chosen = [methods.get(name) for name in args.methods] or sorted(
        methods().values(), key=lambda method: method.name
    )
    missing = {
        (method.name, part)
        for method in chosen
        for part in args.parts
        if part not in rows.get(method.name, {})
    }
    whole = Task() if any(part != "accuracy" for _, part in missing) else None
    cut = Task(LAYERS, TOKENS) if any(part == "accuracy" for _, part in missing) else None
    started = time.monotonic()
    for number, method in enumerate(chosen, 1):
        row = rows.setdefault(method.name, {})
        for part in args.parts:
            if (method.name, part) not in missing or time.monotonic() - started > args.seconds:
                continue
            print(f"  {number}/{len(chosen)} {method.name}: {part}", file=sys.stderr, flush=True)
            task = cut if part == "accuracy" else whole
            assert task is not None
            row[part] = PARTS[part](task, method, args)
            if args.keep:
                with args.keep.open("a") as file:
                    file.write(json.dumps({"method": method.name, "part": part, **row[part]}) + "\n")
        yield {"method": method.name, **row}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="*", default=[], help="by default all")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=["size", "steps", "memory"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="FILE",
        help="append what is measured to this file, and measure nothing that it has",
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no measurement after so long"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page of the results there")
    parser.add_argument("--peak-of", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.peak_of:
        print(peak(args.peak_of, methods.get(args.methods[0]), args))
        return
    rows = []
    for row in rows_of(args):
        rows.append(row)
        if not args.json:
            why = [
                f"   ({NAMES[who]}: {reason[:60]})"
                for who in SIDES
                if (reason := row.get("size", {}).get(f"without_{who}"))
            ]
            print(
                "  {:24} {:>9} {:>10}   {} {}   {:>5} {:>5} {:>5}   {:>5} {:>5} {:>5}".format(*cells(row))
                + "".join(why),
                flush=True,
            )
    rows.sort(key=lambda row: str(row["method"]))
    found = summary(rows)
    if args.json:
        print(
            json.dumps(
                {
                    "benchmark": "methods",
                    "threads": torch.get_num_threads(),
                    "runs": args.runs,
                    "seeds": args.seeds,
                    "methods": rows,
                    **found,
                },
                indent=2,
            )
        )
    else:
        print(sentence(found))
    if args.markdown:
        args.markdown.write_text(markdown(rows, args))


if __name__ == "__main__":
    main()
