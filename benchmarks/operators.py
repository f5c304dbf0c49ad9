"""Steps and prompts with an operator of adapterpack's own and without it, that for LoRAs, for attention or for
quantized products: rows without an adapter, with one, and with another each.

Every contestant is a process of its own, since idle threads of one session take time from another, and a batch of
rows in the middle of decoding. They make a few steps in turn; the first of each turn is not counted. Mixed rows take
the adapters by turns.

    python benchmarks/operators.py bundle --adapters packs/* --rows 1 8 32
    python benchmarks/operators.py bundle --adapters packs/* --operator attention --rows 8 --context 4000 --json
    python benchmarks/operators.py bundle --adapters packs/* --operator products --kinds none prompt --rows 1 8
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from engine import CONTEXT, prefilling, stepping

from adapterpack._native import quantized_matmul, ragged_attention, row_lora
from adapterpack.runtime.engine.engine import DecoderEngine

STEPS = 6
KINDS = ("none", "one", "mixed", "prompt")
OPERATORS = {"lora": row_lora, "attention": ragged_attention, "products": quantized_matmul}


def contestant(args: argparse.Namespace) -> None:
    """Answers each line on its input with the milliseconds of some steps."""
    if args.without:
        OPERATORS[args.operator].LIBRARY = None
    rows, kind = args.rows[0], args.kind
    length = max(1024, args.context + 512, args.prompt + 1)
    engine = DecoderEngine(args.bundle, "cpu", max_rows=rows, max_length=length, prefix_budget=0)
    names = [pack.name for pack in args.adapters]
    for pack in args.adapters:
        engine.adapters.load(pack, pack.name, replace=True)
    if kind == "prompt":
        go = prefilling(engine, names[0], args.prompt)
    else:
        chosen = {"none": [None] * rows, "one": names[:1] * rows, "mixed": (names * rows)[:rows]}[kind]
        go = stepping(engine, chosen, args.context)
    go()
    for _ in iter(sys.stdin.readline, ""):
        times = []
        for _ in range(STEPS):
            started = time.perf_counter()
            go()
            times.append(1e3 * (time.perf_counter() - started))
        print(*times[1:], flush=True)


def in_turns(commands: Mapping[str, Sequence[str]], turns: int) -> Iterator[tuple[str, str]]:
    """Runs contestants, each a process that answers a line with a line, in turns, and yields the name and the answer of
    each; those of the first turn, which waits until all are open, are left out.
    """
    running = {
        name: subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name, words in commands.items()
    }
    for turn in range(turns + 1):
        for name, process in running.items():
            assert process.stdin is not None and process.stdout is not None
            print(turn, file=process.stdin, flush=True)
            answer = process.stdout.readline()
            if turn:
                yield name, answer
    for process in running.values():
        process.communicate()


def measure(args: argparse.Namespace, rows: int) -> dict[str, dict[str, float]]:
    """The median and the least milliseconds of each contestant."""
    words = [__file__, str(args.bundle), "--rows", str(rows), "--context", str(args.context)]
    words += [
        "--prompt",
        str(args.prompt),
        "--operator",
        args.operator,
        "--adapters",
        *map(str, args.adapters),
    ]
    kinds = [kind for kind in args.kinds if rows > 1 or kind != "mixed"]
    commands = {
        f"{kind}{' without' if without else ''}": [*words, "--kind", kind, *["--without"] * without]
        for kind in kinds
        for without in (False, True)
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for name, answer in in_turns(commands, args.turns):
        times[name] += map(float, answer.split())
    return {name: {"median": median(found), "least": min(found)} for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--adapters", type=Path, nargs="+", required=True)
    parser.add_argument("--operator", choices=OPERATORS, default="lora")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS[:3])
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--without", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.kind:
        contestant(args)
        return
    report = {str(rows): measure(args, rows) for rows in args.rows}
    if args.json:
        print(json.dumps({"benchmark": f"operator-{args.operator}", "turns": args.turns, "rows": report}))
        return
    for count, found in report.items():
        for kind in args.kinds:
            if kind in found:
                one, other = found[kind], found[f"{kind} without"]
                print(
                    f"{count:>3} {kind:8}{one['median']:8.1f} ms (least {one['least']:.1f}), without the operator "
                    f"{other['median']:.1f} ({other['least']:.1f}): {other['median'] / one['median']:.2f} times"
                )


if __name__ == "__main__":
    main()
