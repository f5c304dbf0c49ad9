"""Decoding with adapters, compared with peers: tokens a second of one row and of eight, with no adapter, one,
and eight different ones.

Every contestant gets the same requests, all at once: answers of a few tokens, and such with ``--tokens``
more. The difference of their times is that of the tokens alone, whatever is done with the prompts and in
whichever order rows run. The first token is measured after prompts of ``--prefill`` tokens. Medians of ``--runs``;
one contestant after another, each in a process of its own: our engine, our server, and the peers of
`contestants.py`. A library that has one adapter for all rows makes eight answers one after another.

    python benchmarks/peers_decode.py --peers peers --files files --precision fp32 int8 int4
    python benchmarks/peers_decode.py --size tiny --json
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import bare_engine
from clients import Answer, Request, answered, closed_loop, requests
from comparison import parser_of, report
from contestant_files import Files
from contestants import COMPARED, CONTEXT, ROWS, THREADS, Contestant, memory_mb, running, taking_part
from decode import SIZES

from adapterpack.runtime.providers.device import Device

ADAPTERS = 12
"""That are loaded; up to eight of them run."""
PROMPT = 64
FEW = 4
"""Tokens of the short answers."""
BATCHES = ("1 base", "1 adapter", "8 base", "8 one", "8 mixed")
"""Rows, and their adapters."""

Wave = Callable[[Sequence[Request]], list[Answer]]
"""Answers requests that come all at once."""


@contextmanager
def engine(
    files: Files, precision: str, device: Device
) -> Iterator[tuple[Wave, list[str], Callable[[], int]]]:
    """Our engine without a server, and without guessing: answers to random tokens soon repeat themselves."""
    adapters = files.adapters("large", ADAPTERS)
    options = {"max_rows": ROWS, "max_length": CONTEXT, "lookup_tokens": 0, "provider": device}
    with bare_engine.opened(files.bundle(precision), adapters, **options) as bare:
        yield (
            lambda wanted: bare.closed_loop(wanted, len(wanted), 0.0),
            [pack.name for pack in adapters],
            bare.memory_mb,
        )


@contextmanager
def server(
    one: Contestant, files: Files, peers: Path | None
) -> Iterator[tuple[Wave, list[str], Callable[[], int]]]:
    """A server's answers."""
    adapters = files.adapters("large", min(ADAPTERS, one.most_adapters), one.packs, one.precision)
    form, batch = one.form(adapters), one.batch
    with running(one, files, adapters, peers) as (port, session):

        def wave(wanted: Sequence[Request]) -> list[Answer]:
            if batch is not None and len(wanted) > 1:
                return [asyncio.run(answered(port, *batch(wanted)))]
            return asyncio.run(closed_loop(port, form, wanted, len(wanted), 0.0))

        yield wave, [path.stem for path in adapters], lambda: memory_mb(session)


def measured(wave: Wave, names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each batch, and milliseconds to the first token."""
    seeds = iter(range(1 << 20))

    def wanted(adapters: list[str | None], prompt: int, tokens: int) -> list[Request]:
        return requests(
            adapters,
            len(adapters),
            len(adapters),
            prompt=prompt,
            tokens=tokens,
            seed=next(seeds),
            vocabulary=SIZES[args.size]["vocab_size"] * 4 // 5,
        )

    def seconds(adapters: list[str | None], tokens: int) -> float:
        batch, start = wanted(adapters, PROMPT, tokens), time.perf_counter()
        wave(batch)
        return time.perf_counter() - start

    result: dict[str, Any] = {}
    rows: list[list[str | None]] = [[None], [names[0]], [None] * ROWS, [names[0]] * ROWS, [*names[:ROWS]]]
    for what, adapters in zip(BATCHES, rows, strict=True):
        if what not in args.batches:
            continue
        seconds(adapters, FEW)
        times = [
            len(adapters) * args.tokens / (seconds(adapters, FEW + args.tokens) - seconds(adapters, FEW))
            for _ in range(args.runs)
        ]
        result[what] = round(median(times), 1)
    for length in args.prefill:
        wave(wanted([None], length, 1))
        for what, adapter in {"base": None, "adapter": names[0]}.items():
            firsts = [
                answer.first - answer.sent
                for _ in range(args.runs)
                for answer in wave(wanted([adapter], length, 1))
            ]
            result[f"first token after {length}, {what}"] = round(1e3 * median(firsts), 1)
    return result


def measure(args: argparse.Namespace, files: Files) -> dict[str, Any]:
    device = Device(provider="cpu", threads=THREADS)
    every: list[tuple[str, str, Any]] = [
        (
            "engine",
            precision,
            lambda precision=precision: engine(files, precision, device),
        )
        for precision in args.precision
        if not args.only or "engine" in args.only
    ]
    results, missing = [], []
    for one in taking_part(args.precision, args.only):
        if one.program(args.peers) is None:
            missing.append(f"{one.name} {one.precision}: there is no {one.needs} in --peers")
            continue
        every.append((one.name, one.precision, lambda one=one: server(one, files, args.peers)))
    for name, precision, opened in every:
        try:
            with opened() as (wave, names, memory):
                found = measured(wave, names, args)
                results.append({"name": name, "precision": precision, **found, "memory_mb": memory()})
            print(name, precision, results[-1], file=sys.stderr, flush=True)
        except Exception as error:  # a peer that fails costs its own figures only
            missing.append(f"{name} {precision}: {error}")
            print(missing[-1], file=sys.stderr, flush=True)
    return {
        "benchmark": "peers-decode",
        "prompt_tokens": PROMPT,
        "tokens": args.tokens,
        "prefill": args.prefill,
        "runs": args.runs,
        "adapters": ADAPTERS,
        "batches": args.batches,
        "results": results,
        "ratios": compared(results),
        "missing": missing,
    }


def compared(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What our engine and our server make of tokens over each peer, and how many times as soon the first comes."""
    ratios = []
    for mine in results:
        for peer in results:
            if (
                mine["name"] in ("engine", "ours")
                and peer["name"] not in ("engine", "ours")
                and peer["precision"] in COMPARED[mine["precision"]]
            ):
                ratios.append(
                    {
                        "of": f"{mine['name']} {mine['precision']}",
                        "over": f"{peer['name']} {peer['precision']}",
                        **{
                            what: round(
                                mine[what] / peer[what] if what[0].isdigit() else peer[what] / mine[what], 2
                            )
                            for what in mine
                            if what[0].isdigit() or what.startswith("first token")
                        },
                    }
                )
    return ratios


def show(result: dict[str, Any]) -> None:
    """The figures as tables."""
    columns = result["batches"]
    print(
        f"tokens a second; median of {result['runs']}, prompts of {result['prompt_tokens']} tokens; "
        "the first token after so many tokens in ms, base / adapter"
    )
    lengths = result["prefill"]
    print(
        f"{'':18}"
        + "".join(f"{column:>11}" for column in columns)
        + "".join(f"{length:>16}" for length in lengths)
        + f"{'MB':>8}"
    )

    def first(of: dict[str, Any], length: int, digits: int) -> str:
        return " / ".join(
            f"{of[f'first token after {length}, {what}']:.{digits}f}" for what in ("base", "adapter")
        )

    for one in result["results"]:
        speeds = "".join(f"{one[column]:11.1f}" for column in columns)
        firsts = "".join(f"{first(one, length, 0):>16}" for length in lengths)
        print(f"{one['name']:11}{one['precision']:7}{speeds}{firsts}{one['memory_mb']:8}")
    for ratio in result["ratios"]:
        print(
            f"{ratio['of']:13} over {ratio['over']:16}"
            + "  ".join(f"{column} {ratio[column]:.2f}" for column in columns)
            + "".join(f"  after {length} {first(ratio, length, 2)}" for length in lengths)
        )
    for line in result["missing"]:
        print(f"not measured: {line}")


def main() -> None:
    parser = parser_of(__doc__, ["engine"])
    parser.add_argument("--batches", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prefill", type=int, nargs="+", default=[64, 256, 512, 1000])
    parser.add_argument("--runs", type=int, default=5)
    report(parser.parse_args(), measure, show)


if __name__ == "__main__":
    main()
