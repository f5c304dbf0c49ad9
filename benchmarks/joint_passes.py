"""Eight rows in a closed loop, each with another adapter, with joint passes and without them.

``requests``: random prompts of 64 tokens with answers of 64 arrive whenever others end; with the operator for attention
the running rows' tokens are read in the pass over a prompt, without it steps and prompts alternate. ``texts``: edits,
copies and JSON of :mod:`lookup`, in which rows read ahead together, or not. Every contestant is a process of its own;
they take turns, and the first turn is not counted.

    python benchmarks/joint_passes.py bundle --adapters packs/* --turns 5
    python benchmarks/joint_passes.py bundle --adapters packs/* --kinds texts --json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from lookup import TASKS
from operators import in_turns

from adapterpack._native import ragged_attention
from adapterpack.runtime.engine.engine import DecoderEngine

ROWS, WORDS, ANSWER = 8, 64, 64
KINDS = {"requests": "attention", "texts": "lookup", "stories": "lookup"}
"""What is answered, and what the contestants without it lack."""


def prompts(kind: str, turn: int, count: int) -> Iterator[list[int] | str]:
    """The prompts of a turn."""
    dice, tasks = random.Random(turn), list(TASKS.values())
    for number in range(count):
        if kind == "requests":
            yield [dice.randrange(300, 40_000) for _ in range(WORDS)]
        else:
            yield tasks[number % 3] if kind == "texts" else tasks[3 + number % 2]


def answer(engine: DecoderEngine, names: list[str], kind: str, turn: int, count: int) -> dict[str, Any]:
    """Answers a turn's prompts, eight at a time; the times of first tokens are those of the later ones."""
    waiting = list(enumerate(prompts(kind, turn, count)))[::-1]
    begun: dict[int, float] = {}
    firsts: dict[int, float] = {}
    tokens, ignore, started = 0, kind == "requests", time.perf_counter()

    def add() -> None:
        number, prompt = waiting.pop()
        most = ANSWER if ignore else 96
        request = engine.add(
            prompt, names[number % len(names)], max_new_tokens=most, ignore_eos=ignore, temperature=0.0
        )
        begun[request] = time.perf_counter()

    for _ in range(ROWS):
        add()
    while engine.busy:
        for event in engine.step():
            assert event.error is None, event.error
            if event.token is not None:
                tokens += 1
                firsts.setdefault(event.request, time.perf_counter() - begun[event.request])
            if event.finish_reason and waiting:
                add()
    spent = time.perf_counter() - started
    later = [1e3 * first for request, first in firsts.items() if request not in list(begun)[:ROWS]]
    return {"rate": tokens / spent, "firsts": later}


def contestant(args: argparse.Namespace) -> None:
    """Answers each line on its input with what a turn gave."""
    if args.without and KINDS[args.kind] == "attention":
        ragged_attention.LIBRARY = None
    lookup = 8 if KINDS[args.kind] == "lookup" and not args.without else 0
    engine = DecoderEngine(args.bundle, "cpu", max_rows=ROWS, prefix_budget=0, lookup_tokens=lookup)
    names = [pack.name for pack in args.adapters]
    for pack in args.adapters:
        engine.adapters.load(pack, pack.name, replace=True)
    for line in iter(sys.stdin.readline, ""):
        print(json.dumps(answer(engine, names, args.kind, int(line), args.requests)), flush=True)


def measure(args: argparse.Namespace, kind: str) -> dict[str, dict[str, float]]:
    """The median rate of each contestant, and the times of its first tokens."""
    words = [__file__, str(args.bundle), "--requests", str(args.requests), "--kind", kind]
    words += ["--adapters", *map(str, args.adapters)]
    commands = {"with": words, "without": [*words, "--without"]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for name, answered in in_turns(commands, args.turns):
        found[name].append(json.loads(answered))
    report = {}
    for name, taken in found.items():
        firsts = [first for one in taken for first in one["firsts"]]
        report[name] = {
            "tokens_per_second": median(one["rate"] for one in taken),
            "first_p50_ms": median(firsts),
            "first_p95_ms": quantiles(firsts, n=20)[-1],
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--adapters", type=Path, nargs="+", required=True)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--requests", type=int, default=24, help="in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--without", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.kind:
        contestant(args)
        return
    report = {kind: measure(args, kind) for kind in args.kinds}
    if args.json:
        print(json.dumps({"benchmark": "joint-passes", "turns": args.turns, "kinds": report}))
        return
    for kind, found in report.items():
        one, other = (found[name]["tokens_per_second"] for name in ("with", "without"))
        print(f"{kind}: {one:.0f} tokens/s, without {other:.0f}: {one / other:.2f} times", end="; ")
        print("first tokens (p50, p95)", end="")
        for taken in found.values():
            print(f" {taken['first_p50_ms']:.0f} and {taken['first_p95_ms']:.0f} ms", end="")
        print()


if __name__ == "__main__":
    main()
