"""What clients of a server see, of ours and of peers: a closed loop of clients over several adapters, and an
open one at a given rate.

Ours is measured in turn with its engine alone, on the same requests: what HTTP costs is the difference. Peers
are servers of the same base and the same adapters in environments of their own, one after another. Prompts
are random token ids and every answer has all its tokens, so all do the same work. Closed loop: the client of
each answer sends its next request. Open loop (``--rate``): requests of mixed lengths are sent at random
times, and those that have no answer half a minute after the last was sent are given up.

    python benchmarks/serve.py     # SmolLM2-135M, 8 clients, 8 adapters, 64 + 64 tokens
    python benchmarks/serve.py --peers peers --files files     # the peers, too
    python benchmarks/serve.py --html serve.html     # and a page of it
    python benchmarks/serve.py --packs small --adapters 1 8 64 1000 --rate 1
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import time
from statistics import median
from typing import Any

import bare_engine
from bare_engine import BareEngine
from clients import Answer, Form, Request, closed_loop, open_loop, requests, summary
from comparison import parser_of, report
from contestant_files import PACKS, Files
from contestants import COMPARED, CONTEXT, ROWS, THREADS, Contestant, memory_mb, running, taking_part
from decode import SIZES
from served_page import served_report

PATIENCE = 30.0
BEGINNING = 2.0
"""Seconds of a round that its clients, who all begin at once, need to come apart."""


def closed(
    port: int, form: Form, wanted: list[Request], args: argparse.Namespace
) -> tuple[list[Answer], float]:
    """Answers of a round, and the seconds of the processor that the clients took."""
    cpu = time.process_time()
    answers = asyncio.run(closed_loop(port, form, wanted, args.clients, args.seconds))
    return answers, time.process_time() - cpu


def in_rounds(
    port: int, form: Form, names: list[str], bare: BareEngine | None, args: argparse.Namespace
) -> dict[str, Any]:
    """Rounds of the server, and of the engine alone in turn with them."""
    served, alone, cpu = list[list[Answer]](), list[list[Answer]](), 0.0
    for number in range(args.rounds + 1):  # the first one warms up
        few = {} if number else {"tokens": 4}
        wanted = _requests(names, args, 2000 if number else args.clients, number, **few)
        answers, took = closed(port, form, wanted, args)
        other = [] if bare is None else bare.closed_loop(wanted, args.clients, args.seconds)
        if number:
            served.append(answers)
            alone.append(other)
            cpu += took
    result = {"closed": _rounds(served) | {"clients_cpu": round(cpu / sum(_span(one) for one in served), 3)}}
    if bare is not None:
        result["engine"] = _rounds(alone)
        result["http_costs"] = round(
            median(_speed(two) / _speed(one) for one, two in zip(served, alone, strict=True)) - 1, 3
        )
    return result


def _requests(
    names: list[str], args: argparse.Namespace, count: int, seed: int, **others: Any
) -> list[Request]:
    options = {
        "prompt": args.prompt,
        "tokens": args.tokens,
        "vocabulary": SIZES[args.size]["vocab_size"] * 4 // 5,
        **others,
    }
    return requests(names, count, args.clients, seed=seed, **options)


def _rounds(every: list[list[Answer]]) -> dict[str, Any]:
    """The summary of all answers, with the median of the rounds' speeds, and the wait for the first tokens of
    requests that were not among those which came all at once.
    """
    later = [
        one
        for answers in every
        for one in answers
        if one.sent > min(each.sent for each in answers) + BEGINNING
    ]
    return summary([one for answers in every for one in answers]) | {
        "tokens_per_second": round(median(map(_speed, every)), 1),
        "later_first_token_ms": summary(later).get("first_token_ms", {}),
    }


def _span(answers: list[Answer]) -> float:
    return max(one.last for one in answers) - min(one.sent for one in answers)


def _speed(answers: list[Answer]) -> float:
    return sum(one.tokens for one in answers) / _span(answers)


def measured(one: Contestant, files: Files, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """Everything of one server with so many adapters."""
    adapters = files.adapters(args.packs, count, one.packs, one.precision)
    names, form = [path.stem for path in adapters], one.form(adapters)
    started = time.monotonic()
    with running(one, files, adapters, args.peers) as (port, session):
        result: dict[str, Any] = {
            "name": one.name,
            "precision": one.precision,
            "adapters": count,
            "start_seconds": round(time.monotonic() - started, 1),
        }
        if one.name == "ours":
            options = {"max_rows": ROWS, "max_length": CONTEXT, "threads": THREADS}
            with bare_engine.opened(files.bundle(one.precision), adapters, **options) as bare:
                result |= in_rounds(port, form, names, bare, args)
        else:
            result |= in_rounds(port, form, names, None, args)
        if args.rate:
            wanted = _requests(
                names,
                args,
                max(1, round(args.rate * args.seconds * args.rounds)),
                100,
                mixed=True,
                rate=args.rate,
            )
            answers = asyncio.run(open_loop(port, form, wanted, PATIENCE))
            result["open"] = summary(answers) | {"sent": len(wanted)}
        return result | {"memory_mb": memory_mb(session)}


def compared(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our tokens a second over those of each peer with as many adapters, and over ours with the fewest
    adapters.
    """
    ours = [one for one in results if one["name"] == "ours"]
    fewest = min((one["adapters"] for one in results), default=0)
    ratios = []
    for one, mine in itertools.product(results, ours):
        if one["name"] == "ours":
            fits = (mine["precision"], mine["adapters"]) == (one["precision"], fewest) and mine is not one
        else:
            fits = one["precision"] in COMPARED[mine["precision"]] and mine["adapters"] == one["adapters"]
        if fits:
            speeds = mine["closed"]["tokens_per_second"], one["closed"]["tokens_per_second"]
            ratios.append(
                {
                    "of": f"ours {mine['precision']}, {mine['adapters']} adapters",
                    "over": f"{one['name']} {one['precision']}, {one['adapters']} adapters",
                    "tokens_per_second": round(speeds[0] / speeds[1], 2),
                }
            )
    return ratios


def measure(args: argparse.Namespace, files: Files) -> dict[str, Any]:
    results, missing = [], []
    for one in taking_part(args.precision, args.only):
        if one.program(args.peers) is None:
            missing.append(f"{one.name} {one.precision}: there is no {one.needs} in --peers")
            continue
        for count in args.adapters:
            if count <= one.most_adapters:
                try:
                    results.append(measured(one, files, count, args))
                    print_one(results[-1])
                except Exception as error:  # a peer that fails costs its own figures only
                    missing.append(f"{one.name} {one.precision}, {count} adapters: {error}")
                    print(missing[-1], file=sys.stderr, flush=True)
    return {
        "benchmark": "serve",
        "clients": args.clients,
        "prompt_tokens": args.prompt,
        "answer_tokens": args.tokens,
        "packs": args.packs,
        "seconds": args.seconds,
        "rounds": args.rounds,
        "rate": args.rate,
        "results": results,
        "ratios": compared(results),
        "missing": missing,
    }


def print_one(result: dict[str, Any]) -> None:
    """Some of a server's figures as soon as they are there, on standard error."""
    closed, first = result["closed"], result["closed"]["first_token_ms"]["p50"]
    print(
        f"{result['name']:10}{result['precision']:6}{result['adapters']:5} adapters  "
        f"{closed['tokens_per_second']:7.1f} tokens/s  first token {first:.0f} ms",
        file=sys.stderr,
        flush=True,
    )


def show(result: dict[str, Any]) -> None:
    """The figures as a table."""
    print(
        f"{result['clients']} clients, {result['prompt_tokens']} + {result['answer_tokens']} tokens; ms "
        "at p50 / p95 / p99"
    )
    for one in result["results"]:
        for loop in ("closed", "engine", "open"):
            figures = one.get(loop)
            if figures is None or not figures["answers"]:
                continue
            spread = "  ".join(
                f"{name} {' / '.join(f'{value:.0f}' for value in figures[f'{name}_ms'].values())}"
                for name in ("first_token", "later_first_token", "token", "request")
                if figures.get(f"{name}_ms")
            )
            of = f" of {figures['sent']}" if "sent" in figures else ""
            who = f"{one['name']:10}{one['precision']:6}{one['adapters']:5} adapters  {loop:7}"
            print(
                f"{who}{figures['tokens_per_second']:7.1f} tokens/s  {spread}  {figures['answers']}{of} "
                "answers"
            )
        http = f", HTTP costs {one['http_costs']:.1%}" if "http_costs" in one else ""
        cpu = one["closed"]["clients_cpu"]
        print(
            f"{'':10}{one['memory_mb']} MB, ready after {one['start_seconds']} s, clients {cpu:.1%} of "
            f"a core{http}"
        )
    for ratio in result["ratios"]:
        print(f"{ratio['of']} over {ratio['over']}: {ratio['tokens_per_second']:.2f}")
    for line in result["missing"]:
        print(f"not measured: {line}")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--packs", choices=PACKS, default="large")
    parser.add_argument("--adapters", type=int, nargs="+", default=[8])
    parser.add_argument("--clients", type=int, default=ROWS)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a round")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second of an open loop")
    report(parser.parse_args(), measure, show, served_report)


if __name__ == "__main__":
    main()
