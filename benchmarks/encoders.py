"""Embeddings of texts of mixed lengths: the engine's batches beside batches in arrival order, and beside PEFT
in PyTorch.

The texts are the paragraphs of this repository's documentation, in a random order; each has one of
``--adapters`` random LoRAs of all linear layers, in turn. ``engine`` adds them one by one and steps until all
have ended. ``arrival`` is ``Session.run`` of the same bundle on every 16 texts in the order in which they
come. PEFT runs the batches that the engine forms and those in arrival order, by ``adapter_names`` where there
are several adapters. All give means over real tokens, of ids that are made before. The contestants run in
turn after a warm-up; medians of ``--runs``, by the clock and of processor time, which other programs of a
busy machine disturb less and which says something with ``--threads 1``. ``difference`` is the largest between
an embedding of the engine and PEFT's.

    python benchmarks/encoders.py
    python benchmarks/encoders.py --adapters 1 --texts 500 --json
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel

from adapterpack import export, load
from adapterpack.demos import MINILM, fetch
from adapterpack.runtime.engine.encoder_batch import Bounds, next_batch
from adapterpack.runtime.engine.encoder_engine import EncoderEngine
from adapterpack.runtime.padding import pad
from adapterpack.runtime.sessions.session import Session
from adapterpack.tasks.embeddings import POOLING

ROOT = Path(__file__).parent.parent
ROWS = 16
Vectors = np.ndarray
"""``[texts, n]``."""


def texts(count: int, tokenizer: Any, longest: int) -> list[list[int]]:
    """Token ids of paragraphs of the documentation, cut at ``longest``, in a random order."""
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
    paragraphs = [
        part.strip()
        for page in pages
        for part in page.read_text("utf-8").split("\n\n")
        if len(part.split()) > 3
    ]
    random.Random(0).shuffle(paragraphs)
    return [tokenizer.encode(paragraph)[:longest] for paragraph in paragraphs[:count]]


def adapters(base: Path, work: Path, count: int) -> list[Path]:
    """Random LoRAs of rank 8 on every linear layer, as PEFT writes them."""
    torch.manual_seed(0)
    for number in range(count):
        config = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["query", "key", "value", "dense"],
            task_type="FEATURE_EXTRACTION",
        )
        model = get_peft_model(AutoModel.from_pretrained(base), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(work / f"a{number}")
    return [work / f"a{number}" for number in range(count)]


def by_engine(engine: EncoderEngine, rows: Sequence[list[int]], names: Sequence[str]) -> Vectors:
    """Added one by one, stepped until all have ended."""
    numbers = [engine.add(ids, name) for ids, name in zip(rows, names, strict=True)]
    ended = {}
    while engine.busy:
        ended |= {event.request: event.result for event in engine.step()}
    return np.array([(ended[number] or {})["embedding"] for number in numbers])


def in_batches(
    run: Callable[[dict[str, np.ndarray], list[str]], np.ndarray],
    batches: Sequence[Sequence[int]],
    rows: Sequence[list[int]],
    names: Sequence[str],
) -> Vectors:
    """The same by a function of padded inputs and adapters that gives hidden states."""
    result: dict[int, np.ndarray] = {}
    for batch in batches:
        inputs = pad([rows[place] for place in batch], 0, left=False)
        pooled = POOLING["mean"](run(inputs, [names[place] for place in batch]), inputs["attention_mask"])
        result |= dict(zip(batch, pooled, strict=True))
    return np.array([result[place] for place in range(len(rows))])


def peft(model: PeftModel, several: bool) -> Callable[[dict[str, np.ndarray], list[str]], np.ndarray]:
    """PEFT's hidden states, by ``adapter_names`` where there are several adapters."""

    def run(inputs: dict[str, np.ndarray], names: list[str]) -> np.ndarray:
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
            return model(**tensors, **({"adapter_names": names} if several else {})).last_hidden_state.numpy()

    return run


def formed(engine: EncoderEngine, rows: Sequence[list[int]], names: Sequence[str]) -> list[list[int]]:
    """The batches that the engine runs when all rows have been added."""
    for ids, name in zip(rows, names, strict=True):
        engine.add(ids, name)
    waiting = deque(row for kind, row in engine._messages if kind == "add")
    places, batches = {row.number: place for place, row in enumerate(waiting)}, []
    while waiting:
        batch = next_batch(waiting, engine._bounds, engine._batches.fit)
        batches.append([places[row.number] for row in batch])
        waiting = deque(row for row in waiting if row not in batch)
    while engine.busy:
        engine.step()
    return batches


def padding(batches: Sequence[Sequence[int]], rows: Sequence[list[int]]) -> float:
    """The share of positions that is padding."""
    lengths = [[len(rows[place]) for place in batch] for batch in batches]
    return 1 - sum(map(sum, lengths)) / sum(max(batch) * len(batch) for batch in lengths)


def measure(
    base: Path, folders: list[Path], work: Path, count: int, runs: int, bounds: Bounds, threads: int | None
) -> dict[str, Any]:
    """One bundle of these adapters, and all contestants."""
    bundle = work / f"bundle-{len(folders)}"
    export(base, [load(folder) for folder in folders], bundle, mode="bank", task="feature-extraction")
    session = Session(bundle, "cpu", threads)
    engine = EncoderEngine(
        session, max_rows=bounds.rows, max_tokens=bounds.tokens, max_padding=bounds.padding
    )
    model = PeftModel.from_pretrained(
        AutoModel.from_pretrained(base), folders[0], adapter_name=folders[0].name
    ).eval()
    for folder in folders[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    rows = texts(count, session.tokenizer, 256)
    names = [folders[number % len(folders)].name for number in range(len(rows))]
    arrival = [list(range(start, min(start + ROWS, len(rows)))) for start in range(0, len(rows), ROWS)]
    buckets = formed(engine, rows, names)
    other = peft(model, len(folders) > 1)
    contestants: dict[str, Callable[[], Vectors]] = {
        "engine": lambda: by_engine(engine, rows, names),
        "arrival": lambda: in_batches(
            lambda inputs, some: session.run(inputs, some)["last_hidden_state"], arrival, rows, names
        ),
        "peft, the engine's batches": lambda: in_batches(other, buckets, rows, names),
        "peft, arrival": lambda: in_batches(other, arrival, rows, names),
    }
    warm = {name: go() for name, go in contestants.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(runs):
        for name, go in contestants.items():
            started = time.perf_counter(), time.process_time()
            go()
            times[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    middle = {name: tuple(map(median, zip(*every, strict=True))) for name, every in times.items()}
    return {
        "adapters": len(folders),
        "texts": len(rows),
        "tokens": sum(map(len, rows)),
        "passes": len(buckets),
        "padding": {"engine": padding(buckets, rows), "arrival": padding(arrival, rows)},
        "difference": float(np.abs(warm["engine"] - warm["peft, arrival"]).max()),
        "contestants": {
            name: {
                "seconds": wall,
                "processor_seconds": processor,
                "engine_is_faster": wall / middle["engine"][0],
                "engine_takes_less": processor / middle["engine"][1],
            }
            for name, (wall, processor) in middle.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--texts", type=int, default=320)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of both; by default a thread a core")
    parser.add_argument("--max-padding", type=float, default=0.1)
    parser.add_argument("--max-rows", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    base, bounds = fetch(MINILM), Bounds(args.max_rows, args.max_tokens, args.max_padding)
    with tempfile.TemporaryDirectory() as scratch:
        folders = adapters(base, Path(scratch), max(args.adapters))
        results = [
            measure(base, folders[:count], Path(scratch), args.texts, args.runs, bounds, args.threads)
            for count in args.adapters
        ]
    report = {
        "benchmark": "encoders",
        "base": base.name,
        "runs": args.runs,
        "rows": ROWS,
        "threads": args.threads,
        "max_rows": args.max_rows,
        "max_tokens": args.max_tokens,
        "max_padding": args.max_padding,
        "results": results,
    }
    if args.json:
        print(json.dumps(report, indent=2))
        return
    for result in results:
        share = result["padding"]
        print(
            f"{result['adapters']} adapters, {result['texts']} texts, {result['tokens']} tokens; padding "
            f"{share['engine']:.1%} in {result['passes']} passes, {share['arrival']:.1%} in arrival order; "
            f"difference {result['difference']:.1e}"
        )
        for name, one in result["contestants"].items():
            print(
                f"  {name:28} {one['seconds']:7.2f} s ({one['engine_is_faster']:.2f} x the engine's), of "
                f"processors {one['processor_seconds']:7.2f} s ({one['engine_takes_less']:.2f} x)"
            )


if __name__ == "__main__":
    main()
