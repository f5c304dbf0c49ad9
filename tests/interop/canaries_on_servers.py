"""How many planted faults ``validate --against`` finds on servers that run here, and how often it finds one where
there is none: ours, vLLM and llama.cpp with SmolLM2.

    python tests/interop/canaries_on_servers.py --peers PEERS --files FILES [--good 50] [--base] [NAME:PRECISION ...]

PEERS has the environments of benchmarks/contestants.py (docs/benchmarks/serve.md says how they are made). Each
server loads one LoRA with each of 22 faults, which stand for its being loaded wrongly, and others without a fault.
With --base the checkpoint is given, too, so that the fault is named.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from adapter_faults import write_packs  # noqa: E402
from contestant_files import Files  # noqa: E402
from contestants import CONTESTANTS, running  # noqa: E402

import adapterpack  # noqa: E402

STRENGTH = 4.0
"""Logits change by about one, as those of a trained adapter do on texts like its own."""
CHOSEN = ("ours:fp32", "vllm:fp32", "vllm:bf16", "llama.cpp:fp32", "llama.cpp:int8", "llama.cpp:int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--good", type=int, default=50)
    parser.add_argument("--base", action="store_true")
    parser.add_argument("chosen", nargs="*", default=CHOSEN)
    args = parser.parse_args()
    files = Files(args.files, "135m", args.peers)
    packs = args.files / "packs"
    if not packs.is_dir():
        write_packs(files.base, packs, args.good, STRENGTH)
    for name in args.chosen:
        one = next(each for each in CONTESTANTS if f"{each.name}:{each.precision}" == name)
        with running(
            one, files, [_as_read(files, path, one.packs) for path in sorted(packs.iterdir())], args.peers
        ) as (
            port,
            _,
        ):
            _report(name, f"http://127.0.0.1:{port}", packs, files.base if args.base else None)


def _as_read(files: Files, pack: Path, form: str) -> Path:
    """A pack in the format of a server."""
    if form != "gguf":
        return pack
    path = files.folder / "converted" / f"{pack.name}.gguf"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        adapterpack.convert(pack, path, to="gguf", base=files.base)
    return path


def _report(name: str, address: str, packs: Path, base: Path | None) -> None:
    outcomes: dict[str, Counter[str]] = {"good": Counter(), "fault": Counter()}
    missed, seconds = [], []
    for path in sorted(packs.iterdir()):
        kind = path.name.partition("-")[0]
        started = time.perf_counter()
        asked = path if kind == "good" else packs / "good"
        report = adapterpack.validate(asked, base, against=address, model=path.name)
        seconds.append(time.perf_counter() - started)
        outcomes[kind][report.state] += 1
        errors = [one for one in report.findings if one.severity == "error"]
        if bool(errors) != (kind == "fault"):
            missed.append(f"{path.name}: {report.state}; {report.evidence}")
        elif errors:
            print(f"  {path.name}: {errors[0].rule} {errors[0].message}", flush=True)
    print(
        f"{name}: of {outcomes['fault'].total()} faults {dict(outcomes['fault'])}, of {outcomes['good'].total()} good "
        f"ones {dict(outcomes['good'])}, {median(seconds):.1f} s each",
        *missed,
        sep="\n  ",
        flush=True,
    )


if __name__ == "__main__":
    main()
