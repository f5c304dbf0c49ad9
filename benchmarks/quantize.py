"""Schemes of quantized graphs on SmolLM2 and the adapter of the language model's demo: size, perplexity, agreement, exact match, speed.

    python benchmarks/quantize.py --work build/quantize --only "int4, rank 32" --only float --json result.json

Perplexity is that of held-out texts (reviews and tickets of the examples), by the base; agreement is how often the likeliest next token is
the float graph's at the same positions; exact match is that of the adapter `orders` on its test rows. `merged` folds the adapter into the
weights first and quantizes them with ONNX Runtime's quantizer, as one does without adapters at run time; the others quantize the base, and
attach the adapter. Each graph is measured in a process of its own, and speed is the best of three rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import adapterpack
from adapterpack import Session
from adapterpack.demos.models import SMOLLM2, fetch
from adapterpack.training.config.config import read_config
from adapterpack.training.pipeline import train_one

DATA = Path(__file__).parents[1] / "examples" / "data"
CALIBRATION = DATA / "tickets.train.jsonl"
ADAPTER, NEW, PROMPT = "orders", 48, 256
TEXTS = {"reviews": 60, "tickets": 60}
SCHEMES: dict[str, dict[str, Any] | None] = {
    "float": None, "fp16": {"scheme": "fp16"}, "int8": {"scheme": "int8"}, "int4": {"scheme": "int4"}, "int2": {"scheme": "int2"},
    "int4, k-quant": {"scheme": "int4", "algorithm": "k-quant"}, "int4, hqq": {"scheme": "int4", "algorithm": "hqq"},
    "int4, gptq": {"scheme": "int4", "algorithm": "gptq", "calibration": CALIBRATION},
    "int4, awq": {"scheme": "int4", "algorithm": "awq", "calibration": CALIBRATION},
    "int4, rank 32": {"scheme": "int4", "compensate": 32},
    "int4, rank 32, rows": {"scheme": "int4", "compensate": 32, "calibration": CALIBRATION},
    "mixed, error 0.05": {"scheme": "mixed", "error_budget": 0.05},
}
MERGED = {"merged, float": None, "merged, int4": "int4", "merged, int8": "int8"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where adapter and bundles are made, and kept")
    parser.add_argument("--only", action="append", choices=[*SCHEMES, *MERGED], help="all by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measured(arguments.one, arguments.work)))
        return
    results = {}
    for name in arguments.only or [*SCHEMES, *MERGED]:
        folder = made(arguments.work, name)
        command = [sys.executable, __file__, "--work", arguments.work, "--one", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:22}", "  ".join(f"{key} {value:.4g}" for key, value in results[name].items()), flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(results, indent=1))


def made(work: Path, name: str) -> Path:
    """The bundle of that name."""
    pack, folder = work / ADAPTER, work / name.replace(", ", "-").replace(" ", "-")
    base = fetch(SMOLLM2)
    if not pack.exists():
        train_one(read_config({
            "model_name_or_path": str(base), "task": "text-generation", "name": ADAPTER, "output_dir": str(pack),
            "train_file": str(DATA / "orders.train.jsonl"), "method": "lora", "r": 8, "alpha": 16, "targets": "all-linear",
            "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "num_train_epochs": 0.6, "per_device_train_batch_size": 4,
            "max_length": 160, "group_by_length": True, "seed": 0})[0][0])
    if not folder.exists():
        options = SCHEMES.get(name)
        if name in MERGED:
            adapterpack.export(base, [pack], folder, mode="folded", quantize=MERGED[name])
        elif options is None:
            adapterpack.export(base, [pack], folder, mode="bank")
        else:
            adapterpack.quantize(made(work, "float"), folder, **options)
    return folder


def measured(folder: Path, work: Path) -> dict[str, float]:
    """One bundle's figures."""
    session = Session(folder, "cpu", verify="off")
    is_merged = session.bundle.mode == "folded"
    reports = {"mb": sum(file.stat().st_size for file in folder.glob("model.onnx*")) / 1e6}
    best, loss = likeliest(session)
    reports["perplexity"], reports["positions"] = math.exp(loss), float(len(best))
    reference = work / ("merged-likeliest.npy" if is_merged else "likeliest.npy")
    if session.bundle.quantization is None:
        np.save(reference, best)
    if reference.exists():
        reports["agreement"] = float((np.load(reference) == best).mean())
    reports["exact_match"] = exact_match(session, None if is_merged else ADAPTER)
    rng = np.random.default_rng(0)
    for rows in (1, 8):
        short, long = ([rng.integers(100, 10_000, length).tolist() for _ in range(rows)] for length in (8, PROMPT))
        names = None if is_merged else ADAPTER
        first = min(timed(session, long, names, 1) for _ in range(3))
        one, many = (min(timed(session, short, names, new) for _ in range(3)) for new in (1, NEW))
        reports[f"decode_{rows}"] = rows * (NEW - 1) / (many - one)
        reports[f"prefill_{rows}"] = rows * PROMPT / first
    return reports


def likeliest(session: Session) -> tuple[np.ndarray, float]:
    """The likeliest next token at every position of the held-out texts by the base, and the mean loss of the tokens that follow."""
    best, losses = [], []
    for name, count in TEXTS.items():
        for line in (DATA / f"{name}.test.jsonl").read_text().splitlines()[:count]:
            ids = [1, *session.tokenizer.row(json.loads(line)["text"])]
            logits = session.run({"input_ids": np.array([ids])})["logits"][0, :-1].astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            losses.append(np.log(np.exp(logits).sum(-1)) - logits[range(len(ids) - 1), ids[1:]])
            best.append(logits.argmax(-1))
    return np.concatenate(best), float(np.concatenate(losses).mean())


def exact_match(session: Session, adapter: str | None) -> float:
    """The share of test rows whose answer is the expected JSON."""
    rows = [json.loads(line) for line in (DATA / "orders.test.jsonl").read_text().splitlines()]
    right = 0
    for start in range(0, len(rows), 8):
        part = rows[start : start + 8]
        for row, answer in zip(part, session.generate([row["prompt"] for row in part], adapter, max_new_tokens=40), strict=True):
            try:
                right += json.loads(answer.text) == json.loads(row["completion"])
            except ValueError:
                continue
    return right / len(rows)


def timed(session: Session, prompts: list[list[int]], adapter: str | None, new: int) -> float:
    started = time.perf_counter()
    answers = session.generate(prompts, adapter, max_new_tokens=new, min_new_tokens=new)
    assert all(len(answer.ids) == new for answer in answers)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
