"""Whether rows of a deterministic engine have the same bits whatever runs beside them, over many random mixtures.

Each of some requests, of other prompts and adapters, is answered alone first. Then they are answered in random
mixtures, in which rows come and go at random; tokens and log-probabilities must be those of the row alone.

    python benchmarks/same_bits.py bundle --adapters packs/* --mixtures 1000
    python benchmarks/same_bits.py bundle --mixtures 100 --without     # how many differ without the option
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from adapterpack import Engine

REQUESTS = 24
TOKENS = 4


def answers(
    engine: Engine, asked: dict[int, tuple[list[int], str | None]], dice: random.Random
) -> dict[int, list[Any]]:
    """Tokens and log-probabilities of some requests, which join the others at random."""
    waiting, of = list(asked), dict[int, int]()
    found: dict[int, list[Any]] = {number: [] for number in asked}
    while waiting or engine.busy:
        while waiting and dice.random() < 0.6:
            prompt, name = asked[waiting[-1]]
            request = engine.add(prompt, name, max_new_tokens=TOKENS, ignore_eos=True, logprobs=3)
            of[request] = waiting.pop()
        for event in engine.step():
            found[of[event.request]].append(event.choice)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("--adapters", type=Path, nargs="*", default=[])
    parser.add_argument("--mixtures", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--without", action="store_true", help="without the option deterministic")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    options = {"max_rows": args.rows, "max_length": 128, "prefix_budget": 0, "lookup_tokens": 0}
    engine = Engine(args.bundle, "cpu", deterministic=not args.without, **options)
    for pack in args.adapters:
        engine.adapters.load(pack)
    names = [None, *(pack.name for pack in args.adapters)]
    dice, started = random.Random(args.seed), time.monotonic()
    asked = {
        number: ([dice.randrange(5, 500) for _ in range(dice.randrange(2, 24))], dice.choice(names))
        for number in range(REQUESTS)
    }
    alone = {number: answers(engine, {number: one}, dice)[number] for number, one in asked.items()}
    count = other = 0
    for number in range(args.mixtures):
        chosen = dice.sample(list(asked), dice.randrange(2, args.rows + 3))
        for one, found in answers(engine, {one: asked[one] for one in chosen}, dice).items():
            count += 1
            other += found != alone[one]
        if number % 50 == 49:
            print(f"{number + 1} mixtures, {other} of {count} answers differ", file=sys.stderr, flush=True)
    report = {
        "benchmark": "same-bits",
        "mixtures": args.mixtures,
        "answers": count,
        "other": other,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(
        json.dumps(report)
        if args.json
        else f"{other} of {count} answers in {args.mixtures} mixtures differ from the row alone "
        f"({report['seconds']} s)"
    )


if __name__ == "__main__":
    main()
