"""push and pull of a 500 MB bundle beside the official client's upload and download of the same files, on one
machine and one hub.

    python benchmarks/hub.py [--size MB] [--rounds N]

Every measurement is a whole process with caches of its own, ours and the peer's alternately, against
``adapterpack hub serve``. ``pull`` hashes every byte against the manifest and validates what it keeps; the
official client does neither. ``raw`` is curl's place: one GET of the same bytes in Python, which nothing can
be faster than.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from adapterpack import LoRA
from adapterpack.adapter_methods import Site, get
from adapterpack.bundle.manifest import Bundle, BundledAdapter
from adapterpack.io.hashing import sha256_of
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import build

TOKEN = "hf_" + "b" * 30
UP = (
    "from huggingface_hub import HfApi; a = HfApi(); a.create_repo('{0}'); "
    "a.upload_folder(folder_path='bundle', repo_id='{0}')"
)
DOWN = "from huggingface_hub import snapshot_download; snapshot_download('{0}', local_dir='{1}')"
RAW = (
    "import os, urllib.request as u; r = u.urlopen(u.Request(os.environ['HF_ENDPOINT'] + "
    "'/{0}/resolve/main/model.onnx.data'))\n"
    "with open('{1}', 'wb') as f:\n    while c := r.read(1 << 20): f.write(c)"
)


def make_bundle(folder: Path, size: int) -> None:
    """A bundle of a pack and of random bytes in place of a graph, which no hub and no client looks into."""
    rng = np.random.default_rng(0)
    params = {
        "lora_A": rng.standard_normal((3, 7), np.float32),
        "lora_B": rng.standard_normal((5, 3), np.float32),
    }
    build(
        "tickets",
        get("lora"),
        {Site("net.q", 7, 5): (LoRA(r=3, alpha=6), params)},
        task=m.PackTask("feature-extraction"),
        base=m.Base("org/base"),
        license="mit",
    ).write(folder / "adapters" / "tickets")
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "model.onnx.data").write_bytes(rng.bytes(size))


def renew(folder: Path, number: int) -> None:
    """Makes it another bundle, since a hub keeps equal files once."""
    with (folder / "model.onnx.data").open("r+b") as file:
        file.write(number.to_bytes(8, "little"))
    pack = f"sha256:{sha256_of(folder / 'adapters' / 'tickets' / m.FILE_NAME)}"
    Bundle(
        "bank",
        "feature-extraction",
        m.Base("org/base"),
        "mobius",
        {},
        (BundledAdapter("tickets", pack, "adapters/tickets", 1),),
        (),
        slots=2,
    ).write(folder)


def took(environment: dict[str, str], folder: Path, *command: str) -> tuple[float, float]:
    """Seconds on the clock and on the processor, of the process itself."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], env=environment, cwd=folder, check=True, capture_output=True)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        make_bundle(scratch / "bundle", given.size << 20)
        tokens = scratch / "tokens"
        tokens.write_text(f"ann write {TOKEN}\n")
        tokens.chmod(0o600)
        serve = [
            "-m",
            "adapterpack",
            "hub",
            "serve",
            str(scratch / "hub"),
            "--port",
            "0",
            "--tokens",
            str(tokens),
            "--json",
        ]
        with subprocess.Popen([sys.executable, *serve], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            address = json.loads(process.stdout.readline())["address"]
            try:
                measure(scratch, address, given.rounds, given.size)
            finally:
                process.terminate()


def measure(scratch: Path, address: str, rounds: int, size: int) -> None:
    figures: dict[str, list[tuple[float, float]]] = {}
    for turn in range(rounds):
        place = scratch / f"round{turn}"
        place.mkdir()
        (place / "bundle").symlink_to(scratch / "bundle")
        environment = {
            **os.environ,
            "HF_ENDPOINT": address,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(place / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "ADAPTERPACK_CACHE": str(place / "cache"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
        }
        steps = {
            "push: huggingface_hub": ("-c", UP.format(f"ann/theirs{turn}")),
            "push: adapterpack": (
                "-m",
                "adapterpack",
                "push",
                str(scratch / "bundle"),
                f"hf://ann/ours{turn}",
                "--license",
                "mit",
            ),
            "push again: adapterpack": (
                "-m",
                "adapterpack",
                "push",
                str(scratch / "bundle"),
                f"hf://ann/ours{turn}",
                "--license",
                "mit",
            ),
            "pull: adapterpack": ("-m", "adapterpack", "pull", f"hf://ann/ours{turn}", "--no-lock"),
            "pull: huggingface_hub": ("-c", DOWN.format(f"ann/ours{turn}", "fetched")),
            "pull: raw": ("-c", RAW.format(f"ann/ours{turn}", "raw")),
        }
        for label, command in steps.items():
            if label in {"push: adapterpack", "push: huggingface_hub"}:
                renew(scratch / "bundle", 2 * turn + (label == "push: adapterpack"))
            figures.setdefault(label, []).append(took(environment, place, *command))
        shutil.rmtree(place)
    print(f"{size} MB, median of {rounds}:   seconds   MB/s   processor seconds of the client")
    for label, found in figures.items():
        seconds, busy = (sorted(column)[len(found) // 2] for column in zip(*found, strict=True))
        print(f"{label:26} {seconds:10.2f} {size / seconds:8.0f} {busy:10.2f}")


if __name__ == "__main__":
    main()
