"""How many planted faults ``validate --against`` finds where others run a pack, and how often it finds one where
there is none, with SmolLM2: on our server, vLLM's and llama.cpp's, and in PEFT, onnxruntime-genai, MLX and merged
checkpoints.

    python tests/interop/canaries_elsewhere.py --peers PEERS --files FILES [--good 50] [--base] [NAME:PRECISION ...]
    python tests/interop/canaries_elsewhere.py --files FILES peft merged genai mlx

PEERS has the environments of benchmarks/contestants.py (docs/benchmarks/serve.md says how they are made). A library
is asked in this process, so it must be installed beside adapterpack. One LoRA is loaded with each of 22 faults, which
stand for its being loaded wrongly, and others without a fault. With --base the checkpoint is given, too, so that the
fault is named; merged checkpoints and MLX always need it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from adapter_faults import write_packs  # noqa: E402
from contestant_files import Files  # noqa: E402
from contestants import CONTESTANTS, running  # noqa: E402

import adapterpack  # noqa: E402

STRENGTH = 4.0
"""Logits change by about one, as those of a trained adapter do on texts like its own."""
CHOSEN = ("ours:fp32", "vllm:fp32", "vllm:bf16", "llama.cpp:fp32", "llama.cpp:int8", "llama.cpp:int4")
Target = Callable[[Path], Any]
"""What is asked of a pack's folder: an address, a folder or a model."""


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
        given = (
            files.base if args.base or name == "merged" else _base_of_mlx(files) if name == "mlx" else None
        )
        with LIBRARIES[name](files, packs) if name in LIBRARIES else _server(name, files, packs) as target:
            _report(name, target, packs, given)


@contextmanager
def _server(name: str, files: Files, packs: Path) -> Iterator[Target]:
    one = next(each for each in CONTESTANTS if f"{each.name}:{each.precision}" == name)
    adapters = [_as_read(files, path, one.packs) for path in sorted(packs.iterdir())]
    with running(one, files, adapters, files.peers) as (port, _):
        yield lambda pack: f"http://127.0.0.1:{port}"


def _as_read(files: Files, pack: Path, form: str) -> Path:
    """A pack in the format of a server or a library."""
    if form not in ("gguf", "mlx"):
        return pack
    path = files.folder / f"converted-{form}" / (f"{pack.name}.gguf" if form == "gguf" else pack.name)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        adapterpack.convert(pack, path, to=form, base=files.base)
    return path


@contextmanager
def _peft(files: Files, packs: Path) -> Iterator[Target]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    yield lambda pack: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files.base), pack)


@contextmanager
def _merged(files: Files, packs: Path) -> Iterator[Target]:
    merged = files.folder / "merged"

    def target(pack: Path) -> Path:
        shutil.rmtree(merged, ignore_errors=True)
        adapterpack.merge(files.base, [pack], merged)
        return merged

    yield target
    shutil.rmtree(merged)


@contextmanager
def _genai(files: Files, packs: Path) -> Iterator[Target]:
    folder = files.folder / "genai"
    if not folder.is_dir():
        adapterpack.export(files.base, sorted(packs.iterdir()), folder, mode="inputs", target="ort-genai")
    yield lambda pack: folder


def _base_of_mlx(files: Files) -> Path:
    """The base with the rotary base where mlx-lm 0.32 looks for it: it takes 10,000 for a configuration that
    transformers 5 wrote, and answers wrongly (which the canary shows).
    """
    folder = files.folder / "base-mlx"
    if not folder.is_dir():
        shutil.copytree(files.base, folder, copy_function=os.link)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").unlink()
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@contextmanager
def _mlx(files: Files, packs: Path) -> Iterator[Target]:
    yield lambda pack: _as_read(files, pack, "mlx")


LIBRARIES = {"peft": _peft, "merged": _merged, "genai": _genai, "mlx": _mlx}


def _report(name: str, target: Target, packs: Path, base: Path | None) -> None:
    outcomes: dict[str, Counter[str]] = {"good": Counter(), "fault": Counter()}
    missed, seconds = [], []
    for path in sorted(packs.iterdir()):
        kind = path.name.partition("-")[0]
        asked, against = path if kind == "good" else packs / "good", target(path)
        started = time.perf_counter()
        report = adapterpack.validate(asked, base, against=against, model=path.name)
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
