"""Fuzzes the readers with mutated inputs, under a watch of time and memory: only a named error or a true
answer may come out.

    python tests/fuzz/fuzz.py --seconds 600 --findings FOLDER
    python tests/fuzz/fuzz.py --target yaml --target recipe --seconds 1200
    python tests/fuzz/fuzz.py --corpus tests/fuzz/corpus

No input may take a second of the processor, or raise the memory of the process by 64 MB and its own size.
Inputs that get a new answer become seeds themselves, and so do those that cost more than any before. A
finding is kept as a file that ``--replay FILE`` reads again.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import re
import shutil
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import targets as t
import watch
from corpus import archive_of, inputs

MAX_SEEDS = 2000
TURN = 0.05
"""Seconds that one target runs before the next."""


class Tried:
    """What became of one input: the ``answer``, or what is ``wrong`` with it; and what it cost."""

    def __init__(self, target: t.Target, data: bytes) -> None:
        self.answer: str | None = None
        self.wrong = ""
        cost = watch.Cost()
        try:
            with cost:
                self.answer = t.answer(target, data)
        except watch.Hang:
            self._refuse(f"hang: more than {watch.HANG} s\n{traceback.format_exc(limit=-3)}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            self._refuse(traceback.format_exc(limit=-4))
        self.seconds, self.bytes = cost.seconds, cost.bytes - len(data)
        if not self.wrong and self.seconds > watch.HANG:
            self._refuse(f"hang: {self.seconds:.1f} s")
        if not self.wrong and self.bytes > watch.MEMORY:
            self._refuse(f"memory: rose by {self.bytes >> 20} MB")

    def _refuse(self, wrong: str) -> None:
        self.answer, self.wrong = None, wrong


def fuzz(
    targets: dict[str, t.Target], seconds: float, most: float, seed: int, findings: Path | None, first: bool
) -> int:
    """Runs the targets for that long, until each has had ``most`` inputs, or until the ``first`` finding, and
    prints what happened; the number of distinct findings.
    """
    watch.begin()
    # one each: how fast one runs changes nothing for the others
    dice = {name: random.Random(f"{seed} {name}") for name in targets}
    seeds = {name: list(target.seeds) for name, target in targets.items()}
    runs, answers, found = Counter[str](), {name: Counter[str]() for name in seeds}, dict[str, str]()
    worst = dict.fromkeys(seeds, (0.0, 0.0))
    for name, target in targets.items():
        for data in target.seeds:  # twice: what is imported and cached at first is no input's cost
            said = [t.answer(target, data), Tried(target, data).answer]
            if said != [t.ACCEPTED] * 2:
                raise SystemExit(f"a seed of {name} is not accepted: {said}")
    end = time.monotonic() + seconds
    for name in itertools.cycle(targets):  # each has an equal share of the time
        if time.monotonic() >= end or (first and found) or all(runs[one] >= most for one in targets):
            break
        target, rng, turn = targets[name], dice[name], time.monotonic() + TURN
        watch.trim()
        while time.monotonic() < turn and runs[name] < most:
            # the grown pool is mostly of inputs that are refused
            pool = target.seeds if rng.random() < 0.5 else seeds[name]
            data = target.mutate(rng.choice(pool), rng, rng.choice(seeds[name]))
            tried = Tried(target, data)
            runs[name] += 1
            if tried.answer is None:
                key = re.sub(r"\d+", "N", f"{name}: {tried.wrong.strip().splitlines()[-1]}")
                if key not in found:
                    found[key] = tried.wrong
                    _keep(findings, f"{name}-{len(found)}", data, tried.wrong)
                continue
            short = re.sub(r"\d+", "N", tried.answer)[:60]
            answers[name][short] += 1
            costly = tried.seconds > worst[name][0] or tried.bytes > worst[name][1]
            worst[name] = max(worst[name][0], tried.seconds), max(worst[name][1], tried.bytes)
            if (answers[name][short] == 1 or costly) and len(seeds[name]) < MAX_SEEDS:
                seeds[name].append(data)
    for name in seeds:
        said, (slowest, largest) = answers[name], worst[name]
        sys.stdout.write(
            f"{name:12s} {runs[name]:9d} runs, {said[t.ACCEPTED]} accepted, {len(said)} kinds of answer, "
            f"at most {slowest:.2f} s and {largest / 2**20:.1f} MB\n"
        )
    sys.stdout.write(
        f"seed {seed}: {sum(runs.values())} runs in {seconds:.0f} s, {time.process_time():.0f} s of the "
        "processor, "
        f"{len(found)} findings\n"
    )
    return len(found)


def reread(corpus: Path, findings: Path | None) -> int:
    """Reads the kept inputs of every target once more; the number of findings."""
    watch.begin()
    count = found = 0
    for name, target in t.TARGETS.items():
        for data in target.seeds:
            t.answer(target, data)
        for data in inputs(archive_of(corpus, name)):
            count += 1
            if wrong := Tried(target, data).wrong:
                found += 1
                _keep(findings, f"{name}-{found}", data, wrong)
    sys.stdout.write(f"{count} inputs, {found} findings\n")
    return found


def write(names: list[str], corpus: Path, folder: Path) -> None:
    """Writes the seeds of the targets and what was kept for them into a folder for each."""
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, data in enumerate((*t.TARGETS[name].seeds, *inputs(archive_of(corpus, name)))):
            (folder / name / str(number)).write_bytes(data)


def _keep(folder: Path | None, name: str, data: bytes, wrong: str) -> None:
    sys.stderr.write(f"\nFINDING {name}, {len(data)} bytes: {data[:300]!r}\n{wrong}\n")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="of all targets together, in turns")
    parser.add_argument("--runs", type=float, default=math.inf, help="the most inputs of each target")
    parser.add_argument(
        "--target", action="append", choices=t.TARGETS, help="only this one; may be given several times"
    )
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--first", action="store_true", help="ends with the first finding")
    parser.add_argument("--findings", type=Path, help="a folder for the inputs of the findings")
    parser.add_argument(
        "--replay", type=Path, help="reads this file again with the target that its name begins with"
    )
    parser.add_argument("--corpus", type=Path, help="only reads the inputs that guided.py kept here again")
    parser.add_argument(
        "--write", type=Path, help="only writes what fuzzing begins with into a folder for each target"
    )
    parser.add_argument("--names", action="store_true", help="only lists the targets")
    args = parser.parse_args()
    try:
        if args.names:
            sys.stdout.write("\n".join(t.TARGETS) + "\n")
            return
        if args.write:
            write(args.target or list(t.TARGETS), Path(__file__).parent / "corpus", args.write)
            return
        if args.corpus:
            raise SystemExit(reread(args.corpus, args.findings) > 0)
        if args.replay:
            watch.begin()
            target, data = t.TARGETS[args.replay.name.rpartition("-")[0]], args.replay.read_bytes()
            t.answer(target, target.seeds[0])
            tried = Tried(target, data)
            sys.stdout.write(
                f"{tried.answer or tried.wrong}\n{tried.seconds:.2f} s, {tried.bytes / 2**20:.1f} MB\n"
            )
            raise SystemExit(tried.answer is None)
        seed = time.time_ns() & 0xFFFFFFFF if args.seed is None else args.seed
        targets = {name: t.TARGETS[name] for name in args.target or t.TARGETS}
        raise SystemExit(fuzz(targets, args.seconds, args.runs, seed, args.findings, args.first) > 0)
    finally:
        shutil.rmtree(t.SCRATCH, ignore_errors=True)


if __name__ == "__main__":
    main()
