"""A fleet: what two hundred adapters keep of their accuracy and take of memory, and how fast an engine is
that serves them.

``quality`` trains a LoRA for each of many small tasks on MiniLM (see `fleet_tasks.py`), compresses them, and
asks every task of its member: accuracy on test rows beside the original's, and the bytes of the tensors
beside the originals'. ``--seeds`` gives each adapter random numbers of its own to begin with, where one run
of `adapterpack train` after the other begins at the same ones.

``serving`` answers requests on an engine, each with another one of many members of a fleet, beside the same
requests with one member, and with one adapter of its own, in turns. The model is a random Llama of SmolLM2's
size and the fleet has random numbers: speed does not depend on them.

    python benchmarks/fleet.py quality --keep build/fleet --basis 32 64 80
    python benchmarks/fleet.py serving --files build/fleet-engine --basis 32 --json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode import build_base, build_pack
from fleet_tasks import fleet as fleet_of_tasks
from fleet_tasks import trained
from merging_quality import Merged, deltas
from merging_tasks import Suite

import adapterpack
from adapterpack import Engine, Fleet, Pack
from adapterpack.fleet.manifest import FleetSite, Member


def accuracies(suite: Suite, packs: Sequence[Pack]) -> np.ndarray:
    """Of each task on its test rows, with the adapter at its place."""
    found = []
    for task, pack in zip(suite.tasks, packs, strict=True):
        with Merged(suite, deltas(pack)).at(1.0), torch.no_grad():
            answers = suite.heads[task.name](suite.features(suite.model, task.test.inputs)).argmax(dim=1)
        found.append(float((answers == task.test.labels).float().mean()))
    return np.array(found)


def nbytes(packs: Sequence[Pack]) -> int:
    return sum(value.nbytes for pack in packs for value in pack.tensors.values())


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy, error and memory at every rank of bases."""
    suite = fleet_of_tasks(args.count)
    packs = trained(suite, args.keep, args.seeds)
    own, size = accuracies(suite, packs), nbytes(packs)
    rows = []
    for basis in args.basis:
        started = time.perf_counter()
        made = adapterpack.compress(packs, basis=basis, clusters=args.clusters)
        seconds = time.perf_counter() - started
        errors = [member.error for member in made.manifest.members]
        kept = accuracies(suite, [made.pack(pack.name) for pack in packs])
        rows.append(
            {
                "basis": basis,
                "memory": made.nbytes / size,
                "error": float(np.mean(errors)),
                "largest_error": max(errors),
                "accuracy": float(kept.mean()),
                "points": 100 * float((kept - own).mean()),
                "worst_points": 100 * float((kept - own).min()),
                "seconds": seconds,
            }
        )
    before = float(np.mean(list(suite.accuracies(suite.model, "test").values())))
    return {
        "benchmark": "fleet quality",
        "adapters": len(packs),
        "clusters": args.clusters,
        "seeds": args.seeds,
        "bytes": size,
        "base_accuracy": before,
        "accuracy": float(own.mean()),
        "bases": rows,
    }


def random_fleet(pack: Pack, count: int, rank: int) -> Fleet:
    """A fleet of random numbers at the sites of a pack."""
    rng = np.random.default_rng(0)
    sites = tuple(
        FleetSite(
            one.site.path,
            one.site.kind,
            one.site.in_features,
            one.site.out_features,
            one.site.bias,
            one.weight,
        )
        for one in pack.adapters()
    )
    tensors = {}
    for number, site in enumerate(sites):
        k = min(rank, site.in_features, site.out_features)
        tensors[f"down.{number}.0"] = rng.standard_normal((k, site.in_features), np.float32) / 100
        tensors[f"up.{number}.0"] = rng.standard_normal((site.out_features, k), np.float32) / 100
        tensors[f"cores.{number}"] = rng.integers(-127, 128, (count, k, k), np.int8)
        tensors[f"scales.{number}"] = np.full((count, k, 1), 1e-4, np.float32)
    manifest = pack.manifest
    every = tuple(range(len(sites)))
    members = tuple(
        Member(f"member-{number}", pack.id, manifest.task, manifest.problem, None, 0, every, (), (), 0.0, 0.0)
        for number in range(count)
    )
    return Fleet.sealed(
        tensors,
        name="random",
        base=manifest.base,
        rank=rank,
        clusters=1,
        error_budget=None,
        sites=sites,
        members=members,
    )


def answered(engine: Engine, adapters: Sequence[str], tokens: int) -> float:
    """Tokens a second of requests with these adapters, all there from the beginning."""
    prompts = np.random.default_rng(0).integers(3, 60, (len(adapters), 32)).tolist()
    started, made = time.perf_counter(), 0
    for prompt, adapter in zip(prompts, adapters, strict=True):
        engine.add(prompt, adapter, max_new_tokens=tokens, ignore_eos=True)
    while engine.busy:
        made += sum(event.token is not None for event in engine.step())
    return made / (time.perf_counter() - started)


def serving(args: argparse.Namespace) -> dict[str, Any]:
    """Speed and memory of many members, of one member in all rows, and of one adapter of its own."""
    args.files.mkdir(parents=True, exist_ok=True)
    base, own = args.files / "llama-135m", args.files / "pack0"
    if not base.exists():
        build_base(base, "135m")
    if not own.exists():
        build_pack(base, own, args.rank, 0)
    bank = args.files / "bank"
    if not bank.exists():
        adapterpack.export(base, [own], bank, mode="bank", in_place=True)
    alone = adapterpack.load(own)
    made = random_fleet(alone, args.count, args.basis[0])
    members = [made.pack(name) for name in made.names]
    engines = {kind: Engine(bank, "cpu", max_rows=args.rows, prefix_budget=0) for kind in ("one", "fleet")}
    started = time.perf_counter()
    for pack in members:
        engines["fleet"].adapters.load(pack)
    loading = time.perf_counter() - started
    engines["one"].adapters.load(alone, "alone")
    speeds: dict[str, list[float]] = {"one": [], "member": [], "fleet": []}
    for turn in range(args.runs):
        chosen = [made.names[(turn * args.requests + place) % len(members)] for place in range(args.requests)]
        speeds["one"].append(answered(engines["one"], ["alone"] * args.requests, args.tokens))
        speeds["member"].append(answered(engines["fleet"], chosen[:1] * args.requests, args.tokens))
        speeds["fleet"].append(answered(engines["fleet"], chosen, args.tokens))
    medians = {kind: float(np.median(found)) for kind, found in speeds.items()}
    resident = engines["fleet"].adapters.nbytes
    return {
        "benchmark": "fleet serving",
        "adapters": args.count,
        "basis": args.basis[0],
        "rank": args.rank,
        "rows": args.rows,
        "tokens_per_second": medians,
        "all": speeds,
        "ratio": medians["fleet"] / medians["one"],
        "over_one_member": medians["fleet"] / medians["member"],
        "loading_seconds": loading,
        "resident": len(engines["fleet"].adapters.digests),
        "resident_bytes": resident,
        "of_their_own": resident / (args.count * nbytes([alone])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("quality", "serving"))
    parser.add_argument("--count", type=int, default=200, help="adapters")
    parser.add_argument("--basis", type=int, nargs="+", default=[32])
    parser.add_argument("--clusters", type=int, default=1)
    parser.add_argument("--seeds", action="store_true")
    parser.add_argument(
        "--keep", type=Path, default=Path("build/fleet"), help="where trained adapters are kept"
    )
    parser.add_argument(
        "--files", type=Path, default=Path("build/fleet-engine"), help="where the bundle is kept"
    )
    parser.add_argument("--rank", type=int, default=16, help="of the one adapter by itself")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = quality(args) if args.what == "quality" else serving(args)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for key, value in result.items():
        for row in value if isinstance(value, list) else [value]:
            print(f"{key:18} {row}")


if __name__ == "__main__":
    main()
