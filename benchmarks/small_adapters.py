"""Packs in fewer bits: how small their files become, how far their changes move, and what that costs in
accuracy.

The adapters are those of `fleet.py`: LoRAs of small tasks on MiniLM, of which each is asked its test rows as
it was trained and in every scheme. ``groups`` compares sizes of int4's groups, whose scales cost what their
error saves.

    python benchmarks/small_adapters.py --keep build/fleet
    python benchmarks/small_adapters.py --keep build/fleet --count 24 --groups --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fleet import accuracies
from fleet_tasks import fleet, trained
from merging_tasks import Suite

from adapterpack import Pack
from adapterpack.quantizing.pack_scheme import PACK_SCHEMES, PackScheme, all_in
from adapterpack.quantizing.packs import quantize_pack, schemes

GROUPS = (16, 32, 64, 128, None)


def file_bytes(pack: Pack) -> int:
    """Of the tensors' file, header and scales included."""
    return sum(file.size for file in pack.manifest.files if file.role == "tensors")


def row(suite: Suite, packs: list[Pack], own: np.ndarray, small: Callable[[Pack], Pack]) -> dict[str, float]:
    """One line of the table."""
    made = [small(pack) for pack in packs]
    found = accuracies(suite, made)
    stated = [pack.manifest.quantization or {"relative_error": 0.0} for pack in made]
    return {
        "file": sum(map(file_bytes, made)) / sum(map(file_bytes, packs)),
        "error": float(np.mean([one["relative_error"] for one in stated])),
        "accuracy": float(found.mean()),
        "points": 100 * float((found - own).mean()),
        "worst_points": 100 * float((found - own).min()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200, help="tasks, which are those of a fleet as large")
    parser.add_argument("--first", type=int, help="only so many of them are looked at")
    parser.add_argument(
        "--keep", type=Path, default=Path("build/fleet"), help="where trained adapters are kept"
    )
    parser.add_argument("--groups", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    suite = fleet(args.count)
    del suite.tasks[args.first or args.count :]
    packs = trained(suite, args.keep)
    own = accuracies(suite, packs)
    for group in GROUPS if args.groups else ():
        PACK_SCHEMES.register(PackScheme(f"int4-{group or 'whole'}", "", all_in("int4"), group))
    table: dict[str, Any] = {}
    for name in schemes():
        table[name] = row(suite, packs, own, lambda pack, name=name: quantize_pack(pack, scheme=name))  # type: ignore[misc]
    for budget in (0.1, 0.3):
        table[f"int8, ranks cut by {budget}"] = row(
            suite, packs, own, lambda pack, budget=budget: quantize_pack(pack, rank_budget=budget)
        )  # type: ignore[misc]
    result = {
        "benchmark": "small adapters",
        "adapters": len(packs),
        "accuracy": float(own.mean()),
        "schemes": table,
    }
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{len(packs)} adapters, accuracy {own.mean():.4f}")
    print(f"{'scheme':24}{'file':>8}{'error':>9}{'points':>9}{'worst':>8}")
    for name, one in table.items():
        print(
            f"{name:24}{one['file']:8.4f}{one['error']:9.4f}{one['points']:+9.3f}{one['worst_points']:+8.2f}"
        )


if __name__ == "__main__":
    main()
