"""Every method on one small real task, beside PEFT's implementation of it: accuracy, parameters, file size, step time.

The task is the support tickets of the examples (6 classes) on MiniLM, with every linear layer adapted and a trained head. PEFT starts from
the folder that adapterpack wrote: the same tensors, the same hyper-parameters. Steps are taken in turn in one process, forward, backward
and AdamW, after warm-up steps that are not counted; accuracies are means over seeds, on held-out rows.

    python benchmarks/methods.py                         # all methods, step times only
    python benchmarks/methods.py --seeds 3 --epochs 2    # trains each, too
    python benchmarks/methods.py lora ia3 --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
import transformers

from adapterpack import adapt, methods, save
from adapterpack.demo.models import MINILM, fetch
from adapterpack.errors import Unsupported
from adapterpack.methods import Method
from adapterpack.pack.pack import Pack
from adapterpack.tasks import task_named
from adapterpack.train import data
from adapterpack.train.train import load_model

DATA = Path(__file__).parents[1] / "examples" / "data"
RATES = {"weight": 2e-3, "activation": 1e-3, "prompt": 1e-2}
"""Learning rate by kind of method: none is tuned, and both implementations have the same."""
HEAD = "classifier"


class Task:
    """The encoded rows and the base."""

    def __init__(self) -> None:
        self.base = fetch(MINILM)
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.base)
        train, test = (data.load_rows(str(DATA / f"tickets.{part}.jsonl")) for part in ("train", "test"))
        self.labels = data.labels_in(train, "tickets")
        self.train, self.test = (data.encode_classification(rows, tokenizer, self.labels, 64, "tickets") for rows in (train, test))
        self.collate = data.Collator(tokenizer.pad_token_id)

    def model(self) -> Any:
        return load_model(task_named("text-classification"), self.base, self.labels)

    def batches(self, seed: int, size: int) -> Iterable[dict[str, torch.Tensor]]:
        order = np.random.default_rng(seed).permutation(len(self.train))
        return (self.collate([self.train[i] for i in order[start : start + size]]) for start in range(0, len(order), size))

    def accuracy(self, model: Any) -> float:
        model.eval()
        right = 0
        with torch.no_grad():
            for start in range(0, len(self.test), 60):
                batch = self.collate(self.test[start : start + 60])
                right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
        model.train()
        return right / len(self.test)


def ours(task: Task, method: Method, seed: int) -> Any:
    transformers.set_seed(seed)
    config = dataclasses.replace(method.config(), modules_to_save=(HEAD,))
    return adapt(task.model(), config, "bench", seed).train()


def theirs(task: Task, folder: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(task.model(), str(folder), is_trainable=True).train()


def stepper(model: Any, rate: float) -> Callable[[dict[str, torch.Tensor]], float]:
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=rate)

    def step(batch: dict[str, torch.Tensor]) -> float:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def trainable(model: Any) -> int:
    """Parameters of the adapter, without the head."""
    return sum(value.numel() for name, value in model.named_parameters() if value.requires_grad and HEAD not in name)


def size_of(pack: Pack) -> int:
    """Bytes of the adapter's tensors, without the head."""
    adapters = {group.path for group in pack.manifest.groups if group.role != "full"}
    return sum(pack.tensors[name].nbytes for name, entry in pack.manifest.tensors.items() if entry.group in adapters)


def measure(task: Task, method: Method, args: argparse.Namespace) -> dict[str, Any]:
    model = ours(task, method, 0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pack"
        pack = save(model, folder, base=task.base)
        models = {"adapterpack": model}
        why = "no file for PEFT"
        if (folder / "adapter_config.json").is_file():
            try:
                models["peft"] = theirs(task, folder)
            except (ValueError, RuntimeError) as error:  # prompts cannot be trained on, butterflies want a CUDA extension, ...
                why = str(error).partition("\n")[0]
    batch = next(iter(task.batches(0, args.batch)))
    steps = {who: stepper(one, RATES[method.kind]) for who, one in models.items()}
    times: dict[str, list[float]] = {who: [] for who in steps}
    for run in range(args.warm_up + args.runs):
        for who in list(steps) if run % 2 else reversed(steps):  # neither always goes first
            started = time.perf_counter()
            steps[who](batch)
            if run >= args.warm_up:
                times[who].append(time.perf_counter() - started)
    figures = {who: {"step_ms": 1000 * median(values)} for who, values in times.items()}
    ratio = figures["peft"]["step_ms"] / figures["adapterpack"]["step_ms"] if "peft" in figures else None
    for who in figures if args.seeds else ():
        figures[who]["accuracy"] = mean(trained(task, method, who, seed, args) for seed in range(args.seeds))
    return {"method": method.name, "trainable": trainable(model), "bytes": size_of(pack), **figures, "ratio": ratio,
            "without_peft": None if "peft" in figures else why}


def trained(task: Task, method: Method, who: str, seed: int, args: argparse.Namespace) -> float:
    model = ours(task, method, seed)
    if who == "peft":
        with tempfile.TemporaryDirectory() as scratch:
            save(model, Path(scratch) / "pack", base=task.base)
            model = theirs(task, Path(scratch) / "pack")
    step = stepper(model, RATES[method.kind])
    for epoch in range(args.epochs):
        for batch in task.batches(1000 * seed + epoch, args.batch):
            step(batch)
    return task.accuracy(model)


def show(row: dict[str, Any]) -> str:
    sides = []
    for who in ("adapterpack", "peft"):
        figure = row.get(who)
        scored = f" {figure['accuracy']:.3f}" if figure and "accuracy" in figure else ""
        sides.append(f"{figure['step_ms']:7.1f} ms{scored}" if figure else "none")
    ratio = f"  ({row['without_peft'][:60]})" if row["ratio"] is None else f"  ratio {row['ratio']:.2f}"
    return f"  {row['method']:24} {row['trainable']:>9,} parameters {row['bytes']:>10,} bytes   {sides[0]}   PEFT {sides[1]}{ratio}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="methods; by default all")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=0, help="train so often; 0 for step times only")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    task, rows = Task(), []
    for method in [methods.get(name) for name in args.names] or methods().values():
        try:
            rows.append(measure(task, method, args))
        except (Unsupported, ValueError) as error:  # a method for decoders, on an encoder, or one that begins with a text
            print(f"  {method.name:24} not on this model: {str(error)[:90]}", file=sys.stderr)
            continue
        if not args.json:
            print(show(rows[-1]), flush=True)
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    summary = {"median_ratio": median(ratios) if ratios else None, "slowest_ratio": min(ratios, default=None)}
    if args.json:
        facts = {"benchmark": "methods", "threads": torch.get_num_threads(), "runs": args.runs}
        print(json.dumps({**facts, "methods": rows, **summary}, indent=2))
    elif ratios:
        print(f"  time of PEFT's step by ours: median {summary['median_ratio']:.2f}, slowest {summary['slowest_ratio']:.2f}")


if __name__ == "__main__":
    main()
