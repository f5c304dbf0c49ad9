"""A complete plan for a card, in one command that prints a table for each of its parts.

``engine``: steps of rows without an adapter, with one and with another each, beside the base alone, for
float16, int8 and int4 weights, plain and captured as CUDA graphs. ``moe``: ONNX Runtime's MoE operator as a
grouped product over a bank of adapters. ``paged``: PagedAttention in place of GroupQueryAttention. ``hot``:
loads of an adapter while rows run. ``vllm``: vLLM on the same card. ``tolerance``: errors of logits, by
family.

What cannot run says why, below its table; a part that fails costs only its own. ``--provider cpu --size
tiny`` runs all of it in small: its times mean nothing, its errors do. ``--files`` keeps models and bundles
for the next time.

    python benchmarks/gpu.py --base SmolLM2-135M-Instruct --files build/gpu --vllm peers/vllm/bin/python
    python benchmarks/gpu.py --parts moe paged --runs 100 --json
    python benchmarks/gpu.py --provider cpu --size tiny --rows 1 2 --runs 2 --contexts 64 --models 1
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_hot
import gpu_moe
import gpu_paged
import gpu_tolerance
import gpu_vllm
from decode import SIZES, build_base
from engine import KINDS, measure
from gpu_plan import FORMS, Plan, Row, Table, table_of

from adapterpack.errors import ProviderError
from adapterpack.runtime.providers.device import Device
from adapterpack.runtime.providers.resolved_device import resolve

POSITIONS = 8192
"""Of a random base."""


def engine_steps(plan: Plan) -> Table:
    """Milliseconds of steps and prompts, and their ratios to the base alone, as in `engine.py`."""
    args, rows = plan.args, list[Row]()
    *known, fresh = plan.packs
    names: list[str | None] = [pack.name for pack in known]
    for form in args.forms:
        made = {kind: plan.bundle(form, kind) for kind in KINDS}
        for kind, device in plan.devices.items():
            found = measure(plan.base, made, names, args.rows, args.runs, args.prefill, fresh, 1, device)
            for count in args.rows:
                rows.append(
                    _steps(found, f"{count} ") | {"form": form, "steps": kind, "pass": f"{count} rows"}
                )
            prompt = f"prefill {args.prefill} "
            rows.append(
                _steps(found, prompt) | {"form": form, "steps": kind, "pass": f"{args.prefill} tokens"}
            )
    order = ["form", "steps", "pass"]
    return Table(
        [
            {name: row[name] for name in [*order, *(name for name in row if name not in order)]}
            for row in rows
        ],
        [],
    )


def _steps(found: dict[str, Any], prefix: str) -> Row:
    times = {kind: found["steps"].get(prefix + kind) for kind in ("slotless", "none", "one", "mixed")}
    over = {kind: found["over_slotless"].get(prefix + kind) for kind in ("none", "one", "mixed")}
    return {
        **{f"{kind} ms": one and one["median_ms"] for kind, one in times.items()},
        **{f"{kind}/slotless": one and one["median_ms"] for kind, one in over.items()},
    }


PARTS: dict[str, Callable[[Plan], Table]] = {
    "engine": engine_steps,
    "moe": gpu_moe.measure,
    "paged": gpu_paged.measure,
    "hot": gpu_hot.measure,
    "vllm": gpu_vllm.measure,
    "tolerance": gpu_tolerance.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--provider", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="135m", help="of a random base, and of moe's layers")
    parser.add_argument("--base", type=Path, help="a checkpoint of that size in place of a random one")
    parser.add_argument("--files", type=Path, help="where models and bundles are kept for the next time")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["float16", "int8", "int4"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 32], help="in moe's banks")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096], help="of paged")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--prefill", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32, help="of vllm's answers")
    parser.add_argument("--loads", type=int, default=10, help="of hot")
    parser.add_argument("--vllm", help="the Python of an environment that has vLLM")
    parser.add_argument("--families", nargs="+", choices=gpu_tolerance.FAMILIES, help="of tolerance; all")
    parser.add_argument("--models", type=int, default=3, help="of each family")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        resolve(Device(provider=args.provider))
    except ProviderError as error:
        sys.exit(f"NOTHING WAS MEASURED: {error}")
    results, failed = {}, False
    with tempfile.TemporaryDirectory() as scratch:
        work = args.files or Path(scratch)
        base = args.base or work / f"llama-{args.size}"
        if not base.exists():
            build_base(base, args.size, POSITIONS)
        plan = Plan(args, work, base)
        for part in args.parts:
            started = time.perf_counter()
            try:
                table = PARTS[part](plan)
            except Exception as error:  # the other parts are worth as much
                traceback.print_exc()
                table, failed = Table([], [f"{part} failed: {error}"]), True
            seconds = round(time.perf_counter() - started, 1)
            results[part] = {"rows": table.rows, "notes": table.notes, "seconds": seconds}
            if not args.json:
                title = f"\n{part} on {args.provider}, {seconds:.0f} s"
                print("\n".join([title, table_of(table.rows), *table.notes]), flush=True)
    if args.json:
        print(json.dumps({"benchmark": "gpu", "provider": args.provider, "parts": results}, indent=2))
    sys.exit(failed)


if __name__ == "__main__":
    main()
