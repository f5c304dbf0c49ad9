"""Fuzzes the readers guided by coverage: inputs that reach new code become seeds. The targets and the watch of time
and memory are those of ``fuzz.py``; atheris (``pip install atheris``, not on every platform) chooses the inputs.

    python tests/fuzz/guided.py --seconds 60 --corpus tests/fuzz/corpus --findings FOLDER
    python tests/fuzz/guided.py --target bundle --seconds 1200

Half of the inputs are changed as the format of the target is, the others byte by byte. Each target is a process of
its own. With ``--corpus`` the inputs that reached code which the seeds do not are kept, as few as reach
it all; the tests read them again.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
INSIDE = sys.argv[1:2] == ["--inside"]
"""Whether this process runs a target."""
os.environ["RUST_BACKTRACE"] = "0"  # the first backtrace of a panic, which is an error of ours, takes 66 MB
with atheris.instrument_imports(include=["adapterpack"] if INSIDE else ["nothing"]):
    import fuzz
    import targets as t
    from corpus import archive_of, inputs, keep

LONGEST = 1 << 14
"""Bytes of an input; the seeds are smaller."""
RUNS = re.compile(rb"^#(\d+)\s.*?\bcov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE)


def guided(name: str, options: list[str]) -> None:
    """Runs one target in this process, which libFuzzer ends."""
    target = t.TARGETS[name]
    fuzz.watch.begin()
    for data in target.seeds:  # what is imported and cached at first is no input's cost
        t.answer(target, data)

    def read(data: bytes) -> None:
        tried = fuzz.Tried(target, data)
        if tried.answer is None:
            raise AssertionError(tried.wrong)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        dice = random.Random(seed)
        if dice.random() < 0.5:
            return bytes(atheris.Mutate(data, most))
        return target.mutate(data, dice, dice.choice(target.seeds))[:most]

    # libFuzzer starts itself by its name again where it merges
    frozen = getattr(sys, "frozen", False)  # a program that says by itself which target it is
    itself = sys.executable if frozen else f"{sys.executable} -W ignore {__file__} --inside {name}"
    atheris.Setup([itself, *options], read, custom_mutator=mutate)
    atheris.Fuzz()


def run(name: str, seconds: int, corpus: Path | None, findings: Path) -> bool:
    """Fuzzes one target in a process of its own and prints what it reached; whether it found something."""
    with tempfile.TemporaryDirectory() as scratch:
        seeds, grown = Path(scratch, "seeds"), Path(scratch, "grown")
        for folder in (seeds, grown):
            folder.mkdir()
        for number, data in enumerate(t.TARGETS[name].seeds):
            (seeds / str(number)).write_bytes(data)
        kept = None if corpus is None else archive_of(corpus, name)
        for number, data in enumerate(inputs(kept) if kept else ()):
            (grown / str(number)).write_bytes(data)
        command = [sys.executable, "-W", "ignore", __file__, "--inside", name, f"-max_len={LONGEST}"]
        limits = ["-timeout=0", "-rss_limit_mb=0", f"-artifact_prefix={findings}/{name}-"]
        folders = [str(grown), str(seeds)]
        done = _ended([*command, *limits, f"-max_total_time={seconds}", *folders])
        said = RUNS.findall(done.stderr)
        runs, edges, _, count = map(int, said[-1]) if said else (0, 0, 0, 0)
        sys.stdout.write(f"{name:17}{runs:9,} runs, {edges:6,} edges reached, {count:5,} inputs\n")
        if done.returncode:
            sys.stdout.write(done.stderr.decode(errors="replace")[-3000:])
        elif kept is not None:
            # what reaches no more than the seeds and the others is left out
            _ended([*command, "-set_cover_merge=1", *reversed(folders)]).check_returncode()
            keep([path.read_bytes() for path in seeds.iterdir() if not path.name.isdigit()], kept)
        return bool(done.returncode)


def _ended(command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, capture_output=True, check=False)


def main() -> None:
    if INSIDE:
        guided(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", action="append", choices=t.TARGETS)
    parser.add_argument("--seconds", type=int, default=60, help="of each target")
    parser.add_argument("--corpus", type=Path, help="where inputs are kept for the next time")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    args = parser.parse_args()
    args.findings.mkdir(parents=True, exist_ok=True)
    found = [run(name, args.seconds, args.corpus, args.findings) for name in args.target or t.TARGETS]
    raise SystemExit(any(found))


if __name__ == "__main__":
    main()
