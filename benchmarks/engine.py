"""The engine's steps: what adapters cost, beside the same decoder without slots, on one random Llama or a
base of yours.

Every contestant is a batch of rows in the middle of decoding; a step makes one token for each. ``slotless``
is the graph of the base alone, which is the floor. ``none``: rows without an adapter on the graph with slots.
``one``: all rows have the same adapter. ``mixed``: every row has another. Steps of all contestants are run in
turn; the median counts, and the minimum beside it says how quiet the machine was. Prompts of ``--prefill``
tokens are read by a row with an adapter and by one without. A pack that the bundle does not have is loaded
from its folder ``--loads`` times: looked through, compared with base and digests, and made into a row's
inputs. After each time it is unloaded.

    python benchmarks/engine.py --size 135m --rows 1 8
    python benchmarks/engine.py --base SmolLM2-135M-Instruct --quantize int4 --runs 40
    python benchmarks/engine.py --size tiny --json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from decode import SIZES, build_base, build_pack

from adapterpack.exporting.pipeline import export
from adapterpack.runtime.engine.engine import Engine
from adapterpack.runtime.engine.requests import SequenceState
from adapterpack.runtime.providers.device import Device

CONTEXT = 64
"""Tokens that every row has before the first step, unless told otherwise."""


KINDS: dict[str, dict[str, str]] = {
    "slotless": {"mode": "folded", "task": "text-generation"},
    "bank": {"mode": "bank"},
}
"""The base alone, and with a bank."""


def bundles(
    work: Path,
    base: Path,
    packs: list[Path],
    scheme: str | None,
    dtype: str = "float32",
    kinds: Iterable[str] = tuple(KINDS),
) -> dict[str, Path]:
    """Bundles of these kinds, as far as they are not there yet; their engine graphs are what is measured."""
    made = {kind: work / kind for kind in kinds}
    for kind, folder in made.items():
        if not folder.exists():
            held = packs if kind == "bank" else []
            export(base, held, folder, in_place=True, quantize=scheme, dtype=dtype, **KINDS[kind])
    return made


def random_packs(base: Path, work: Path, rank: int, count: int) -> list[Path]:
    """LoRAs at all linear layers of the base, as far as they are not there yet."""
    packs = [work / f"pack{number}" for number in range(count)]
    for seed, pack in enumerate(packs):
        if not pack.exists():
            build_pack(base, pack, rank, seed)
    return packs


def stepping(engine: Engine, names: list[str | None], context: int = CONTEXT) -> Callable[[], None]:
    """A batch of rows with these adapters in the middle of decoding; called, it makes a step and goes back to
    where it was.
    """
    rng, batch = np.random.default_rng(0), engine.rows
    rows = [
        SequenceState(
            prompt=[int(token) for token in rng.integers(1, 60, context)],
            adapter=None if name is None else engine.adapters.acquire(engine.adapters.pack(name)),
        )
        for name in names
    ]
    for row in rows:
        batch.admit(row)
    for row in rows:
        batch.prefill(context)
        row.next_token = 7

    def step() -> None:
        batch.decode()
        for row in rows:
            row.kv_len -= 1

    return step


def prefilling(engine: Engine, name: str | None, tokens: int) -> Callable[[], None]:
    """Reads a prompt."""
    prompt = [int(token) for token in np.random.default_rng(1).integers(1, 60, tokens)]

    def read() -> None:
        row = SequenceState(
            prompt=prompt,
            adapter=None if name is None else engine.adapters.acquire(engine.adapters.pack(name)),
        )
        engine.rows.admit(row)
        engine.rows.prefill(tokens)
        engine.rows.remove(row)

    return read


def timed(contestants: dict[str, Callable[[], None]], runs: int) -> dict[str, list[float]]:
    """Milliseconds of each run, all in turn, after a warm-up."""
    for go in contestants.values():
        go()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(runs):
        for name, go in contestants.items():
            started = time.perf_counter()
            go()
            times[name].append(1e3 * (time.perf_counter() - started))
    return times


def measure(
    base: Path,
    made: dict[str, Path],
    names: list[str | None],
    rows: list[int],
    runs: int,
    prefill: int,
    fresh: Path,
    loads: int,
    device: Device | str = "cpu",
    context: int = CONTEXT,
) -> dict[str, Any]:
    """Everything, as JSON, of these bundles with adapters of these names; ``fresh`` is a pack that they do
    not have. Mixed rows take the adapters by turns.
    """
    times: dict[str, list[float]] = {}
    for count in rows:
        batches = {"none": [None] * count, "one": names[:1] * count, "mixed": (names * count)[:count]}

        def batch(form: str, chosen: list[str | None], count: int = count) -> Callable[[], None]:
            length = max(1024, context + 1)
            engine = Engine(made[form], device, max_rows=count, max_length=length, prefix_budget=0)
            return stepping(engine, chosen, context)

        contestants = {f"{count} slotless": batch("slotless", [None] * count)}
        contestants |= {
            f"{count} {kind}": batch("bank", chosen)
            for kind, chosen in batches.items()
            if count > 1 or kind != "mixed"
        }
        times |= timed(contestants, runs)
    reader = Engine(made["bank"], device, max_rows=1, prefix_budget=0)
    times |= timed(
        {
            f"prefill {prefill} {kind}": prefilling(reader, name, prefill)
            for kind, name in (("none", None), ("one", names[0]))
        },
        max(5, runs // 5),
    )
    steps = {
        name: {"median_ms": median(all_times), "min_ms": min(all_times)} for name, all_times in times.items()
    }
    ratios = {}
    for name, found in steps.items():
        count, _, kind = name.partition(" ")
        floor = steps.get(f"{count} slotless") if kind in ("none", "one", "mixed") else None
        if floor is not None:
            ratios[name] = {key: found[key] / floor[key] for key in found}
    return {
        "benchmark": "engine",
        "base": base.name,
        "provider": reader.bundle.provider,
        "runs": runs,
        "context": context,
        "adapters": len(names),
        "steps": steps,
        "over_slotless": ratios,
        "load": loading(reader, fresh, loads),
    }


def loading(engine: Engine, pack: Path, loads: int) -> dict[str, float]:
    """Milliseconds of the first load of a pack and of later ones, and megabytes of memory after the first
    load and after the last.
    """
    process, times, memory = psutil.Process(), [], []
    for _ in range(loads):
        started = time.perf_counter()
        engine.adapters.load(pack, "loaded")
        times.append(1e3 * (time.perf_counter() - started))
        engine.adapters.unload("loaded")
        memory.append(process.memory_info().rss / 1e6)
    return {
        "first_ms": times[0],
        "median_ms": median(times),
        "last_ms": times[-1],
        "first_mb": memory[0],
        "last_mb": memory[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="135m")
    parser.add_argument("--base", type=Path, help="a checkpoint in place of a random one")
    parser.add_argument("--quantize", choices=("int8", "w8a8", "int4"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--adapters", type=int, help="of mixed rows; else another one in each row")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens of each row before a step")
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--prefill", type=int, default=256)
    parser.add_argument("--loads", type=int, default=10)
    parser.add_argument("--files", type=Path, help="where bundles and adapters are kept for the next time")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.files or Path(scratch)
        base = args.base or work / f"llama-{args.size}"
        if args.base is None and not base.exists():
            build_base(base, args.size)
        *packs, fresh = random_packs(base, work, args.rank, (args.adapters or max(args.rows)) + 1)
        made = bundles(work / (args.quantize or "float32"), base, packs, args.quantize)
        names = [pack.name for pack in packs]
        options = {"context": args.context}
        result = measure(base, made, names, args.rows, args.runs, args.prefill, fresh, args.loads, **options)
        result |= {"quantize": args.quantize, "rank": args.rank}
    if args.json:
        print(json.dumps(result, indent=2))
        return
    show(result)


def show(result: dict[str, Any]) -> None:
    """The table in words."""
    for name, found in result["steps"].items():
        ratio = result["over_slotless"].get(name)
        says = (
            f"  {ratio['median_ms']:.2f} of slotless ({ratio['min_ms']:.2f} by the minima)" if ratio else ""
        )
        print(f"{name:18} {found['median_ms']:8.1f} ms  (least {found['min_ms']:.1f}){says}")
    load = result["load"]
    print(
        f"load: first {load['first_ms']:.1f} ms, median {load['median_ms']:.1f}, last {load['last_ms']:.1f}; "
        f"{load['first_mb']:.0f} MB, at the end {load['last_mb']:.0f}"
    )


if __name__ == "__main__":
    main()
