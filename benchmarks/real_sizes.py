"""The commands at the sizes of real models: memory, disk and minutes of a merge, of exports, of a first token
and of a server with two adapters.

The checkpoint is random, sharded and in bfloat16, and never in memory as a whole. Each command is a process
of its own. Its anonymous memory is what it needs; the resident also counts pages of mapped files, which the
system takes back when it wants to. Disk is what lies in the working folder at once, temporary files too, over
what the step found there.

    python benchmarks/real_sizes.py --shape 1.2b --work /data
    python benchmarks/real_sizes.py --shape 8b --steps int4 "run int4" "serve int4" --json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from merge import SIZES, build_base, build_pack

PACKS = ("tickets", "claims")
RANK = 16
EXPORTS: dict[str, tuple[str, ...]] = {
    "float": (),
    "bfloat16": ("--dtype", "bfloat16"),
    "int8": ("--quantize", "int8"),
    "int4": ("--quantize", "int4"),
}
STEPS = ("merge", *(f"{what}{name}" for name in EXPORTS for what in ("", "run ", "serve ")))
USUAL = ("merge", *(f"{what}{name}" for name in ("float", "int4") for what in ("", "run ", "serve ")))
EVERY = 0.1
"""Seconds between two looks at a process and its files."""
PROMPT = "w5 w6 w7 w8"


def build_tokenizer(folder: Path, words: int) -> None:
    """A word for each row of the embedding."""
    vocabulary = {f"w{number}": number for number in range(words)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    written = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(written))


class Watch:
    """The largest memory of a session's processes together, and of a folder's files, until it is left."""

    def __init__(self, session: int, folder: Path) -> None:
        self._session, self._folder, self._over = session, folder, threading.Event()
        self.anonymous = self.resident = self.disk = 0
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.disk = max(self.disk, bytes_in(self._folder))  # a quick command may end between two looks

    def _look(self) -> None:
        while not self._over.wait(EVERY):
            held = {"RssAnon": 0, "VmRSS": 0}
            for stat in Path("/proc").glob("[0-9]*/stat"):
                with contextlib.suppress(OSError):
                    if int(stat.read_text().rpartition(")")[2].split()[3]) == self._session:
                        for line in (stat.parent / "status").read_text().splitlines():
                            name, _, value = line.partition(":")
                            if name in held:
                                held[name] += int(value.split()[0]) << 10
            self.anonymous = max(self.anonymous, held["RssAnon"])
            self.resident = max(self.resident, held["VmRSS"])
            self.disk = max(self.disk, bytes_in(self._folder))


def bytes_in(folder: Path) -> int:
    """What the files in a folder take of the disk, those with several names once."""
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            stat = path.lstat()
            found[stat.st_ino] = stat.st_blocks * 512
    return sum(found.values())


@contextlib.contextmanager
def started(work: Path, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A command of the package while the block lasts, and what it took, which is complete after the block."""
    figures: dict[str, Any] = {}
    log = (work / "log").open("w+")
    scratch = work / "scratch"
    scratch.mkdir(exist_ok=True)
    found, spent, begun = bytes_in(work), resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(scratch)}
    command = [sys.executable, "-W", "ignore", "-m", "adapterpack", *map(str, arguments)]
    with (
        log,
        subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=environment, text=True
        ) as process,
    ):
        try:
            with Watch(process.pid, work) as watch:
                yield process, figures
                process.wait()
        finally:
            process.kill()
        log.seek(0)
        said = log.read()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}\n{said[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures |= {
        "seconds": time.monotonic() - begun,
        "cpu": after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime,
        "anonymous": watch.anonymous,
        "resident": watch.resident,
        "disk": watch.disk - found,
        "said": [line for line in said.splitlines() if "bundle of about" in line or "proof" in line],
    }


def run(work: Path, *arguments: object) -> dict[str, Any]:
    """A command that ends by itself."""
    with started(work, *arguments) as (_, figures):
        pass
    return figures


def serve(work: Path, bundle: Path, length: int) -> dict[str, Any]:
    """A server, and a request for each adapter: the seconds until it is ready, and of the answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    begun = time.monotonic()
    limits = ("--max-rows", 2, "--max-length", length, "--audit", "")
    with started(work, "serve", bundle, "--port", port, *limits) as (process, figures):
        while process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5)
                break
            time.sleep(0.2)
        figures["ready"] = time.monotonic() - begun
        for name in PACKS:
            wanted = json.dumps({"model": name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0})
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions",
                wanted.encode(),
                {"Content-Type": "application/json"},
            )
            sent = time.monotonic()
            with urllib.request.urlopen(request, timeout=600) as answer:
                tokens = json.load(answer)["usage"]["completion_tokens"]
            figures.setdefault("answers", {})[name] = {"seconds": time.monotonic() - sent, "tokens": tokens}
        process.terminate()
    return figures


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The figures of each step that is asked for, and of the exports that they need."""
    base, packs = work / f"llama-{args.shape}", [work / name for name in PACKS]
    if not base.exists():
        build_base(base, args.shape, "bfloat16")
        build_tokenizer(base, SIZES[args.shape]["vocab_size"])
    for seed, pack in enumerate(packs):
        if not pack.exists():
            build_pack(base, pack, RANK, seed=seed)
    found: dict[str, Any] = {}
    for step in [step for step in STEPS if step in args.steps]:
        what, _, name = step.rpartition(" ")
        out = work / f"bundle-{name}"
        if step == "merge":
            found[step] = run(work, "merge", base, packs[0], "-o", work / "merged")
            found[step]["bytes"] = bytes_in(work / "merged")
            shutil.rmtree(work / "merged")
        elif what == "run":
            limits = ("--max-new-tokens", 1, "--adapter", PACKS[0])
            found[step] = run(work, "run", out, "--prompt", PROMPT, *limits)
        elif what == "serve":
            found[step] = serve(work, out, args.length)
        else:
            shutil.rmtree(out, ignore_errors=True)
            options = (*EXPORTS[name], *(() if args.proof is None else ("--proof", args.proof)))
            found[step] = run(work, "export", base, *packs, "-o", out, *options)
            found[step]["bytes"] = bytes_in(out)
        print(f"{step}: {json.dumps(found[step])}", file=sys.stderr, flush=True)
        if (
            step != "merge"
            and not args.keep
            and not any(
                later.endswith(name) for later in STEPS[STEPS.index(step) + 1 :] if later in args.steps
            )
        ):
            shutil.rmtree(out, ignore_errors=True)
    return {"benchmark": "real_sizes", "shape": args.shape, "base_bytes": bytes_in(base), "steps": found}


def show(result: dict[str, Any]) -> None:
    """Prints a row for each step."""
    print(f"{result['shape']}, bfloat16, {result['base_bytes'] / 1e9:.2f} GB of checkpoint")
    print(f"{'':16}{'s':>8}{'CPU s':>8}{'own MB':>8}{'all MB':>8}{'disk GB':>9}{'out GB':>8}")
    for name, step in result["steps"].items():
        written = f"{step['bytes'] / 1e9:8.2f}" if "bytes" in step else f"{'':8}"
        answers = "".join(
            f"  {one['tokens']} tokens in {one['seconds']:.1f} s" for one in step.get("answers", {}).values()
        )
        ready = f"  ready after {step['ready']:.0f} s" if "ready" in step else ""
        print(
            f"{name:16}{step['seconds']:8.0f}{step['cpu']:8.0f}{step['anonymous'] / 2**20:8.0f}"
            f"{step['resident'] / 2**20:8.0f}{step['disk'] / 1e9:9.2f}{written}{ready}{answers}"
        )


def main() -> None:
    """Measures, and prints a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SIZES, default="1.2b")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=USUAL)
    parser.add_argument("--proof", choices=("full", "layers", "none"))
    parser.add_argument("--length", type=int, default=512, help="the most tokens of a row of the server")
    parser.add_argument("--work", type=Path, help="where to build and write; what is there is used again")
    parser.add_argument("--keep", action="store_true", help="leave the bundles there")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        result = measure(args, work)
    print(json.dumps(result, indent=2)) if args.json else show(result)


if __name__ == "__main__":
    main()
