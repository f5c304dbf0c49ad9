"""Schemes of quantized graphs on SmolLM2 and the adapter of the language model's demo, beside other
quantizers.

    python benchmarks/quantize.py --work build/quantize --peers peers --json result.json
    python benchmarks/quantize.py --work build/quantize --json result.json --speed --only "int4, rank 32"
    --only float

Ours quantize the base and attach the adapter; `merged` fold the adapter into the weights first, as one does
without adapters at run time, and so do the peers: ONNX Runtime's quantizers on the merged graph,
onnxruntime-genai's builder and llama.cpp on the merged checkpoint. Perplexity, exact match and agreement
(with the float graph) are those of the adapter `orders` on its test rows, as `quantize --compare` has them;
`text` is the perplexity of held-out texts (reviews and tickets of the examples) by the base, where it is not
merged. llama.cpp gives no log-probabilities of a prompt: its perplexity is that of its file's weights in
float. Figures are written to --json as they come, and what is there is not measured again; those of speed are
taken with --speed, in processes of their own, one row on two threads, best of three rounds. On a machine that
others use, too, --passes goes over all of them several times. Environments of peers:
docs/benchmarks/serve.md; llama.cpp's is `xllamacpp`.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import quantized_contestants as contestants
from quantized_contestants import ADAPTER, DATA, ENDS, NEW

from adapterpack import Session
from adapterpack.quantizing.comparing import figures as measuring
from adapterpack.quantizing.comparing.rows import Example, examples

TEXTS = {"reviews": 40, "tickets": 40}
SHORT, LONG, MANY, ROUNDS = 8, 256, 48, 3
THREADS = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="where adapter, bundles and files of peers are made, and kept",
    )
    parser.add_argument(
        "--peers", type=Path, help="the folder of the peers' environments: docs/benchmarks/serve.md"
    )
    parser.add_argument("--only", action="append", choices=list(contestants.EVERY), help="all by default")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--speed", action="store_true", help="take the times, and nothing else")
    parser.add_argument(
        "--passes",
        type=int,
        default=1,
        help="how often --speed goes over all of them; the best time of each counts",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="measure what has been measured, too; of times the better one stays",
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measured(args.one, args)))
        return
    key = "decode" if args.speed else "perplexity"
    wanted = [
        name
        for name in args.only or contestants.EVERY
        if args.again or key not in _results(args.json).get(name, {})
    ]
    for turn in range(args.passes if args.speed else 1):
        for name in wanted:
            if not contestants.EVERY[name].there(args.peers):
                print(f"{name:24}not there", flush=True)
                continue
            command = [sys.executable, "-W", "ignore", __file__, *map(str, sys.argv[1:]), "--one", name]
            found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if found.returncode:
                print(f"{name:24}failed", flush=True)
                continue
            results, new = _results(args.json), json.loads(found.stdout.splitlines()[-1])
            done = results.setdefault(name, {})
            done |= {
                what: max(value, done.get(what, 0.0)) if args.speed and (turn or args.again) else value
                for what, value in new.items()
            }
            args.json.write_text(json.dumps(results, indent=1))
            print(f"{name:24}", "  ".join(f"{what} {value:.4g}" for what, value in done.items()), flush=True)


def _results(file: Path) -> dict[str, dict[str, Any]]:
    """The figures that there are."""
    found: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    return found


def measured(name: str, args: argparse.Namespace) -> dict[str, float]:
    """One contestant's figures."""
    one = contestants.EVERY[name]
    path = one.made(args.work, args.peers)
    if one.kind != "bundle":
        return of_peer(one, path, args)
    session, adapter = (
        Session(path, "cpu", threads=THREADS if args.speed else 1, verify="off"),
        None if one.merged else ADAPTER,
    )
    if args.speed:
        decode, prefill = measuring.speed(session, adapter, ())
        return {"decode": decode or math.nan, "prefill": prefill}
    rows = orders(args.work)
    found = measuring.quality(session, adapter, rows)
    reference = args.work / "likeliest.npy"
    if name == "float":
        np.save(reference, found.best)
    result = {
        "mb": one.nbytes(path) / 1e6,
        "perplexity": found.perplexity or math.nan,
        "exact_match": found.right or 0.0,
    }
    if reference.exists():
        result["agreement"] = float((np.load(reference) == found.best).mean())
    if not one.merged:
        result["text"] = perplexity(
            lambda ids: session.run({"input_ids": np.array([ids])})["logits"][0], list(texts(session))
        )
    return result


def of_peer(one: contestants.Contestant, path: Path, args: argparse.Namespace) -> dict[str, float]:
    """A peer's figures: its answers and times come from its own environment."""
    session = Session(args.work / "float", "cpu", threads=THREADS, verify="off")
    rng, rows = np.random.default_rng(0), orders(args.work)
    short, long = (rng.integers(1, 40_000, length).tolist() for length in (SHORT, LONG))
    prompts = [] if args.speed else [list(row.ids[: row.given]) for row in rows]
    wanted = {
        "prompts": prompts,
        "new": NEW,
        "short": short,
        "long": long,
        "many": MANY,
        "rounds": ROUNDS if args.speed else 0,
    }
    command = [one.program(args.peers), "-P", Path(__file__).with_name("quantized_peers.py"), one.kind, path]
    done = subprocess.run(
        list(map(str, command)),
        input=json.dumps(wanted),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=contestants.environment(),
    )
    found = json.loads(done.stdout.splitlines()[-1])
    if args.speed:
        return {"decode": found["decode"], "prefill": found["prefill"]}
    answers = [
        each if isinstance(each, str) else session.tokenizer.decode(_before_end(each))
        for each in found["answers"]
    ]
    right = float(
        np.mean(
            [measuring.same(answer, row.expected or "") for answer, row in zip(answers, rows, strict=True)]
        )
    )
    return {
        "mb": one.nbytes(path) / 1e6,
        "perplexity": perplexity(one.logits(path), [(row.ids, row.given) for row in rows]),
        "exact_match": right,
    }


def _before_end(ids: list[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in ENDS), len(ids))]


@cache
def orders(work: Path) -> list[Example]:
    """The test rows of the adapter."""
    return examples(
        Session(contestants.EVERY["float"].made(work, None), "cpu", verify="off"), DATA / "orders.test.jsonl"
    )


def texts(session: Session) -> Iterator[tuple[tuple[int, ...], int]]:
    """Held-out texts, which begin with the token that the model's texts begin with."""
    for name, count in TEXTS.items():
        for line in (DATA / f"{name}.test.jsonl").read_text().splitlines()[:count]:
            yield (1, *session.tokenizer.row(json.loads(line)["text"])), 0


def perplexity(
    logits_of: Callable[[tuple[int, ...]], np.ndarray], rows: list[tuple[tuple[int, ...], int]]
) -> float:
    """Of the tokens behind those that are given."""
    losses = []
    for ids, given in rows:
        first = max(given, 1)
        logits = logits_of(ids)[first - 1 : len(ids) - 1].astype(np.float64)
        losses.append(np.logaddexp.reduce(logits, -1) - logits[np.arange(len(logits)), ids[first:]])
    return math.exp(float(np.concatenate(losses).mean()))


if __name__ == "__main__":
    main()
