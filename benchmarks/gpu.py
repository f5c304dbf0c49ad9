"""The engine's steps on a GPU: the tables of ``engine.py`` for float16, int8 and int4 graphs, plain and
captured as CUDA graphs.

Tokens a second are those of a step of 8 rows: 8000 over its milliseconds. Where there is no card the script
says so and ends with exit code 1; ``--provider cpu --size tiny`` runs the same code on the CPU, whose figures
mean nothing.

    python benchmarks/gpu.py --base SmolLM2-135M-Instruct
    python benchmarks/gpu.py --provider cpu --size tiny --runs 2
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from decode import SIZES, build_base
from engine import bundles, measure, random_packs, show

from adapterpack.errors import ProviderError
from adapterpack.runtime.providers.device import Device
from adapterpack.runtime.providers.resolved_device import resolve

FORMS: dict[str, str | None] = {"float16": None, "int8": "int8", "int4": "int4"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--provider", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="135m")
    parser.add_argument("--base", type=Path, help="a checkpoint in place of a random one")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--prefill", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    devices = {"plain": Device(provider=args.provider)}
    if args.provider == "cuda":
        devices["captured"] = Device(provider="cuda", capture=True)
    try:
        resolve(devices["plain"])
    except ProviderError as error:
        sys.exit(f"NOTHING WAS MEASURED: {error}")
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        base = args.base or work / f"llama-{args.size}"
        if args.base is None:
            build_base(base, args.size)
        *packs, fresh = random_packs(base, work, args.rank, max(args.rows) + 1)
        names: list[str | None] = [pack.name for pack in packs]
        for form in args.forms:
            made = bundles(work / form, base, packs, FORMS[form], "float16")
            for kind, device in devices.items():
                result = results[f"{form} {kind}"] = measure(
                    base, made, names, args.rows, args.runs, args.prefill, fresh, 10, device
                )
                if not args.json:
                    print(f"{form}, {kind}, {result['provider']}", flush=True)
                    show(result)
    if args.json:
        print(json.dumps({"benchmark": "gpu", "tables": results}, indent=2))


if __name__ == "__main__":
    main()
