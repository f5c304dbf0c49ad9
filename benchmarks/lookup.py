"""Tokens read ahead: what an answer at one row gains where it repeats its prompt, and costs where it does not.

Two engines on one bundle answer each task alternately, one with tokens guessed from the row's own text, one
without; each figure is the median of the rounds, in tokens a second after the first token, with the passes that
the answer took. Answers are greedy, and have to be the same.

    python benchmarks/lookup.py bundle
    python benchmarks/lookup.py bundle --adapter tickets --tokens 256 --json
    python benchmarks/lookup.py bundle --draft bundle-int8
    python benchmarks/lookup.py bundle --prompts 1000 --tokens 16     # only whether answers are the same
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

from adapterpack import Engine

CODE = """def add_all(numbers):
    total = 0
    for number in numbers:
        total = total + number
    if total > 100:
        print("large", total)
    return total


def mean(numbers):
    total = add_all(numbers)
    return total / len(numbers)"""
VISITS = (
    "On Monday Anna went to Lisbon to buy twelve blue mugs. Nobody was there. In Paris the shop on the corner sold "
    "her a clock for forty euros. She slept well. On Friday she drove to Berlin to meet the head of the museum."
)
PEOPLE = "Anna, Lisbon, 31; Ben, Paris, 42; Carla, Rome, 27; David, Berlin, 55; Eva, Madrid, 38"
TASKS = {
    "code edit": f"Repeat this Python code and rename the variable total to result:\n```python\n{CODE}\n```",
    "extraction": f"Copy every sentence that names a city, word for word:\n{VISITS}",
    "JSON": f'Write a JSON list of five objects with the keys "name", "city" and "age" for: {PEOPLE}.',
    "explanation": "Why is the sky blue? Explain it in a friendly way.",
    "story": "Write a short story about a fox and a lighthouse.",
}


def answer(engine: Engine, prompt: str, adapter: str | None, tokens: int) -> tuple[list[int], int, float]:
    """The tokens of an answer, the passes after the first token, and the tokens a second after it."""
    engine.add(prompt, adapter, max_new_tokens=tokens, temperature=0.0)
    found: list[int] = []
    passes, start = 0, 0.0
    while engine.busy:
        passes += bool(found)
        taken = [event.token for event in engine.step() if event.token is not None]
        start = start or (time.perf_counter() if taken else 0.0)
        found += taken
    return found, passes, (len(found) - 1) / (time.perf_counter() - start)


def others(engines: dict[str, Engine], adapter: str | None, tokens: int, prompts: int) -> list[str]:
    """Which of so many prompts, of words of the tasks in which some repeat, are answered otherwise."""
    dice, words, found = random.Random(7), " ".join(TASKS.values()).split(), []
    for _ in range(prompts):
        start, length = dice.randrange(len(words)), dice.randrange(3, 30)
        part = " ".join(words[start : start + length])
        prompt = f"{part} {' '.join(dice.choices(words, k=dice.randrange(12)))} {part[: dice.randrange(len(part))]}"
        one, two = (answer(engine, prompt, adapter, tokens)[0] for engine in engines.values())
        if one != two:
            found.append(prompt)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("--adapter")
    parser.add_argument("--draft", help="a bundle that guesses what the text does not suggest")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompts", type=int, help="only compare the answers to so many prompts")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    engines = {
        name: Engine(args.bundle, "cpu", threads=args.threads, max_rows=1, prefix_budget=0, **options)
        for name, options in (("single", {"lookup_tokens": 0}), ("ahead", {"draft": args.draft}))
    }
    if args.prompts:
        differ = others(engines, args.adapter, args.tokens, args.prompts)
        print(f"{len(differ)} of {args.prompts} answers of {args.tokens} tokens differ", *differ, sep="\n")
        return
    report: dict[str, Any] = {}
    for task, prompt in TASKS.items():
        speeds: dict[str, list[float]] = {name: [] for name in engines}
        answers, passes = {}, {}
        for _ in range(args.rounds + 1):  # the first warms up
            for name, engine in engines.items():
                answers[name], passes[name], speed = answer(engine, prompt, args.adapter, args.tokens)
                speeds[name].append(speed)
        medians = {name: statistics.median(found[1:]) for name, found in speeds.items()}
        report[task] = {
            "tokens": len(answers["ahead"]),
            "same": answers["single"] == answers["ahead"],
            "passes": passes["ahead"],
            **{f"{name}_tokens_per_second": round(value, 1) for name, value in medians.items()},
            "times": round(medians["ahead"] / medians["single"], 2),
        }
    if args.json:
        print(json.dumps(report))
        return
    print(f"{'':14}{'tokens':>8}{'passes':>8}{'single':>9}{'ahead':>8}{'times':>7}  tokens/s")
    for task, row in report.items():
        print(
            f"{task:14}{row['tokens']:8}{row['passes']:8}{row['single_tokens_per_second']:9}"
            f"{row['ahead_tokens_per_second']:8}{row['times']:7}{'' if row['same'] else '  another answer'}"
        )


if __name__ == "__main__":
    main()
