"""Threads of one session and of several on the same cores: tokens a second of engines that step at once, each
on a thread of its own.

python benchmarks/threads.py --size 135m --engines 1 2
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

from decode import SIZES, build_base, build_pack
from engine import bundles, stepping

from adapterpack.runtime.engine.engine import Engine
from adapterpack.runtime.providers.device import Device


def together(steps: list[object], seconds: float) -> float:
    """Steps a second of all of them, in as many threads."""
    made, end = [0] * len(steps), time.perf_counter() + seconds

    def run(place: int) -> None:
        while time.perf_counter() < end:
            steps[place]()  # type: ignore[operator]
            made[place] += 1

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(steps))]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(made) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="135m")
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        base, pack = Path(scratch) / "base", Path(scratch) / "pack"
        build_base(base, args.size)
        build_pack(base, pack, 16, 0)
        bank = bundles(Path(scratch), base, [pack], None)["bank"]
        for count in args.engines:
            settings = {
                (threads, spinning)
                for threads in {cores, max(1, cores // count), 1}
                for spinning in (True, False)
            }
            batches = {}
            for threads, spinning in sorted(settings):
                device = Device(provider="cpu", threads=threads, spinning=spinning)
                batches[threads, spinning] = [
                    stepping(Engine(bank, device, max_rows=args.rows, prefix_budget=0), [None] * args.rows)
                    for _ in range(count)
                ]
            best = dict.fromkeys(batches, 0.0)
            for _ in range(args.rounds):
                for setting, steps in batches.items():
                    best[setting] = max(best[setting], args.rows * together(list(steps), args.seconds))
            for (threads, spinning), tokens in best.items():
                results.append(
                    {
                        "engines": count,
                        "threads": threads,
                        "spinning": spinning,
                        "tokens_per_second": round(tokens, 1),
                    }
                )
                if not args.json:
                    print(
                        f"{count} engines, {threads} threads each, "
                        f"{'spinning' if spinning else 'not spinning'}: {tokens:.1f} tokens/s"
                    )
    if args.json:
        print(
            json.dumps(
                {"benchmark": "threads", "cores": cores, "rows": args.rows, "results": results}, indent=2
            )
        )


if __name__ == "__main__":
    main()
