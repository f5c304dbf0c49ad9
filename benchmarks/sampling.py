"""Choosing the next token of eight rows of 128k words: milliseconds of processor time, for each kind of
parameters.

``sorting`` is the same choice by sorting every row in float64, as adapterpack did it before. The two run in
turn; the median counts.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --rows 1 --vocabulary 49152 --dtype float16
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np

from adapterpack.runtime.generation.sampler import Sampler
from adapterpack.runtime.generation.sampling import Sampling

KINDS = {
    "greedy": {},
    "temperature": {"temperature": 0.7},
    "top-k": {"temperature": 0.7, "top_k": 50},
    "top-p": {"temperature": 0.7, "top_p": 0.9},
    "top-k, top-p": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "min-p": {"temperature": 0.7, "min_p": 0.05},
    "top-p, penalties": {
        "temperature": 0.7,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
    },
    "greedy, 5 logprobs": {"logprobs": 5},
    "top-p of flat logits": {"temperature": 2.0, "top_p": 0.999},
}


def sorting(logits: np.ndarray, options: Sampling, draws: list[np.random.Generator]) -> None:
    """One token a row; penalties and log-probabilities are left out."""
    if options.temperature == 0:
        np.argmax(logits, axis=-1)
        return
    for row, rng in zip(logits.astype(np.float64) / options.temperature, draws, strict=True):
        order = np.argsort(-row, kind="stable")
        order = order[: options.top_k] if options.top_k else order
        weights = np.exp(row[order] - row[order[0]])
        weights /= weights.sum()
        kept = int(np.searchsorted(np.cumsum(weights), options.top_p)) + 1
        rng.choice(order[:kept], p=weights[:kept] / weights[:kept].sum())


def choosing(logits: np.ndarray, rows: list[Sampler]) -> None:
    """One token a row."""
    for one, row in zip(logits, rows, strict=True):
        row.next(one)


def cost(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    logits = (np.random.default_rng(0).standard_normal((args.rows, args.vocabulary)) * 3).astype(args.dtype)
    print(
        f"{args.rows} rows of {args.vocabulary} {args.dtype}, ms of processor "
        f"time\n{'':24}{'sorting':>9}{'adapterpack':>13}"
    )
    for name, fields in KINDS.items():
        options = Sampling(**fields)
        rows = [Sampler(options, range(2000), stream=row) for row in range(args.rows)]
        draws = [np.random.default_rng(row) for row in range(args.rows)]
        turns = [
            (cost(lambda o=options, d=draws: sorting(logits, o, d)), cost(lambda r=rows: choosing(logits, r)))
            for _ in range(args.runs + 1)
        ][1:]
        before, after = (median(times) for times in zip(*turns, strict=True))
        print(f"{name:24}{before:9.1f}{after:13.2f}")


if __name__ == "__main__":
    main()
