"""PEFT's own test cases through this package: attached, merged, and there and back, compared with PEFT
itself.

    python tests/interop/peft_tables.py --jobs 2 --check

The cases are read from the source package of the installed PEFT, which pip fetches; see ``peft_cases``.
``--write`` renews the golden table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parent), str(_HERE.parents[1])]
os.environ["HF_HUB_OFFLINE"] = "1"  # every model is made here

GOLDEN = _HERE.parent / "golden" / "peft_tables.tsv"


def main() -> int:
    options = _options()
    from peft_cases import outcomes, release
    from peft_cases.cases import all_cases, unread_tables
    from peft_cases.trial import Outcome, Step

    names = [case.name for case in all_cases()]
    wanted = [name for name in names if all(word.lower() in name.lower() for word in options.only)]
    if options.list:
        print("\n".join(wanted))
        return 0
    with tempfile.TemporaryDirectory(prefix="peft-tables-") as scratch:
        done = options.keep or Path(scratch) / "done.jsonl"
        if options.worker is not None:
            return _work(options.worker, done, wanted, Path(scratch))
        _spread(options.jobs, done, options.only)
        rows = [json.loads(row) for file in _parts(done) for row in file.read_text("utf-8").splitlines()]
    by_name = {
        row["name"]: Outcome(**{**row, **{step: Step(**row[step]) for step in ("attach", "merge", "trip")}})
        for row in rows
    }
    found = [by_name[name] for name in wanted if name in by_name]
    if missing := [name for name in wanted if name not in by_name]:
        print("\n".join(f"no outcome: {name}" for name in missing))
        return 1
    if options.json:
        print(
            json.dumps(
                {"peft": release.version(), "cases": [outcome.to_json() for outcome in found]}, indent=1
            )
        )
    elif options.causes:
        print(outcomes.totals(found) + "\n" + outcomes.causes(found))
    elif options.only and not options.check:
        print("\n".join(outcomes.line(outcome) for outcome in found))
    else:
        print(outcomes.totals(found))
    if options.write:
        GOLDEN.write_text(outcomes.table(found, release.version()), "utf-8")
    if options.check:
        differences = outcomes.difference(GOLDEN.read_text("utf-8"), found, whole=not options.only)
        differences += [f"! a table that is not read: {name}" for name in unread_tables()]
        print("\n".join(differences) or "as in the golden table")
        return bool(differences)
    return 0


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="cases with this in their name; several: with all",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="FILE",
        help="outcomes are kept beside it; a run that was stopped goes on from there",
    )
    parser.add_argument("--list", action="store_true", help="the cases' names alone")
    parser.add_argument("--json", action="store_true", help="every outcome with its whole error")
    parser.add_argument("--causes", action="store_true", help="the outcomes grouped by cause")
    parser.add_argument(
        "--check", action="store_true", help="compare with the golden table: exit 1 where it differs"
    )
    parser.add_argument("--write", action="store_true", help="renew the golden table")
    parser.add_argument("--worker", metavar="I/N", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("the golden table holds every case: --write without --only")
    return options


def _spread(jobs: int, done: Path, only: list[str]) -> None:
    """The cases in as many processes; one that dies takes its case with it, which is then missing."""
    words = [word for text in only for word in ("--only", text)]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", f"{number}/{jobs}", "--keep", str(done), *words]
        )
        for number in range(jobs)
    ]
    for worker in workers:
        worker.wait()


def _work(share: str, done: Path, wanted: list[str], scratch: Path) -> int:
    import torch
    import transformers
    from peft_cases.cases import all_cases
    from peft_cases.pairs import run

    sys.path.append(str(_HERE.parents[1] / "examples" / "shadow_peft"))
    from adapterpack_shadow import layers, method

    from adapterpack.adapter_methods import register
    from adapterpack.torch_adapters.adapter_kinds import KINDS

    register(method.shadow)  # as an entry point does where that package is installed
    KINDS.register(layers.shadow)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # models this small only wait for each other's threads
    number, count = map(int, share.split("/"))
    before = {
        json.loads(row)["name"] for file in _parts(done) for row in file.read_text("utf-8").splitlines()
    }
    chosen = set(wanted[number::count]) - before
    with done.with_name(f"{done.name}.{number}").open("a", encoding="utf-8") as out:
        for case in all_cases():
            if case.name in chosen:
                out.write(json.dumps(run(case, scratch).to_json()) + "\n")
                out.flush()
    return 0


def _parts(done: Path) -> list[Path]:
    return sorted(done.parent.glob(f"{done.name}.[0-9]*"))


if __name__ == "__main__":
    sys.exit(main())
