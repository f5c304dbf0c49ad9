"""Fuzzes the readers with mutated inputs, under a watch of time and memory: only a named error or a true answer may come out.

    python tests/fuzz/fuzz.py --seconds 600 --findings FOLDER

Inputs that get a new answer become seeds themselves. A finding is kept as a file that ``--replay FILE`` reads again.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import targets as t

HANG = 1.0
"""Seconds of processor time that one input may take."""
MEMORY = 64 << 20
"""Bytes that the process may grow beyond its size at the start and the size of the input."""
CEILING = 1 << 30
"""Bytes of further address space: a demand beyond it fails at once, instead of taking the machine down."""
MAX_SEEDS = 2000
TURN = 0.05
"""Seconds that one target runs before the next."""


class Hang(BaseException):
    """The input took too long; no ``except Exception`` may hide it."""


def watch() -> int:
    """Puts the watch on this process; what its memory peaked at so far, in bytes."""
    def too_long(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGVTALRM, too_long)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + CEILING,) * 2)
    return peak()


_STATUS = Path("/proc/self/status").open("rb", buffering=0)  # noqa: SIM115 - as long as the process


def peak() -> int:
    """The most memory that this program held at once; ``ru_maxrss`` would count what its parent held when it was started."""
    _STATUS.seek(0)
    return int(_STATUS.read(4096).partition(b"VmHWM:")[2].split()[0]) << 10


def tried(target: t.Target, data: bytes, start: int) -> tuple[str | None, str]:
    """(answer, "") or (None, what is wrong with it)."""
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG)
    try:
        answer = t.answer(target, data)
    except Hang:
        return None, f"hang: more than {HANG} s\n{traceback.format_exc(limit=-3)}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return None, traceback.format_exc(limit=-4)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if (grown := peak() - start) > MEMORY + len(data):
        return None, f"memory: grew by {grown >> 20} MB"
    return answer, ""


def fuzz(seconds: float, seed: int, findings: Path | None, first: bool) -> int:
    """Runs for that long, or until the ``first`` finding, and prints what happened; the number of distinct findings."""
    start, end = watch(), time.monotonic() + seconds
    dice = {name: random.Random(f"{seed} {name}") for name in t.TARGETS}  # one each: how fast one runs changes nothing for the others
    seeds = {name: list(target.seeds) for name, target in t.TARGETS.items()}
    runs, answers, found = Counter[str](), {name: Counter[str]() for name in seeds}, dict[str, str]()
    for name, target in t.TARGETS.items():
        for data in target.seeds:
            if (answer := tried(target, data, start))[0] != t.ACCEPTED:
                raise SystemExit(f"a seed of {name} is not accepted: {answer}")
    for name in itertools.cycle(t.TARGETS):  # each has an equal share of the time
        if time.monotonic() >= end or (first and found):
            break
        target, rng, turn = t.TARGETS[name], dice[name], time.monotonic() + TURN
        while time.monotonic() < turn:
            pool = target.seeds if rng.random() < 0.5 else seeds[name]  # the grown pool is mostly of inputs that are refused
            data = target.mutate(rng.choice(pool), rng, rng.choice(seeds[name]))
            said, wrong = tried(target, data, start)
            runs[name] += 1
            if said is None:
                key = re.sub(r"\d+", "N", f"{name}: {wrong.strip().splitlines()[-1]}")
                if key not in found:
                    found[key] = wrong
                    _keep(findings, f"{name}-{len(found)}", data, wrong)
                if wrong.startswith("memory"):
                    start = peak()  # told once, not for every input that follows
                continue
            short = re.sub(r"\d+", "N", said)[:60]
            answers[name][short] += 1
            if answers[name][short] == 1 and len(seeds[name]) < MAX_SEEDS:
                seeds[name].append(data)
    for name in seeds:
        said = answers[name]
        sys.stdout.write(f"{name:12s} {runs[name]:9d} runs, {said[t.ACCEPTED]} accepted, {len(said)} kinds of answer\n")
    sys.stdout.write(f"seed {seed}: {sum(runs.values())} runs in {seconds:.0f} s, {len(found)} findings, peak {peak() >> 20} MB\n")
    return len(found)


def _keep(folder: Path | None, name: str, data: bytes, wrong: str) -> None:
    sys.stderr.write(f"\nFINDING {name}, {len(data)} bytes: {data[:300]!r}\n{wrong}\n")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--first", action="store_true", help="ends with the first finding")
    parser.add_argument("--findings", type=Path, help="a folder for the inputs of the findings")
    parser.add_argument("--replay", type=Path, help="reads this file again with the target that its name begins with")
    args = parser.parse_args()
    try:
        if args.replay:
            said, wrong = tried(t.TARGETS[args.replay.name.rpartition("-")[0]], args.replay.read_bytes(), watch())
            sys.stdout.write(f"{said or wrong}\n")
            raise SystemExit(said is None)
        seed = time.time_ns() & 0xFFFFFFFF if args.seed is None else args.seed
        raise SystemExit(fuzz(args.seconds, seed, args.findings, args.first) > 0)
    finally:
        shutil.rmtree(t.SCRATCH, ignore_errors=True)


if __name__ == "__main__":
    main()
