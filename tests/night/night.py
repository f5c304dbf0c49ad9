"""Random trials for a night: kills at any moment, files with changed bytes, and graphs of random
configurations.

    python tests/night/night.py --seconds 3600 --findings FOLDER
    python tests/night/night.py --trial kill_merge --seed 81237

Each trial has a seed of its own, which all its dice come from; one that fails is printed with the command
that repeats it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import files
import graphs
import kills
from processes_of_trials import TIMEOUT, Timeout

Trial = Callable[[random.Random, Path], None]
"""Raises where something is wrong; gets its dice, and an empty folder."""
TRIALS: Mapping[str, Trial] = {**kills.TRIALS, **files.TRIALS, **graphs.TRIALS}
SHARES = {"graph": 4.0}
"""How much more time than others a trial gets whose one run takes long."""


def outcome(name: str, seed: int, folder: Path) -> str | None:
    """What was wrong in a trial, which runs in a process of its own; None for nothing."""
    report = folder.with_name(f"{folder.name}.txt")
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            signal.alarm(TIMEOUT)
            signal.signal(signal.SIGALRM, _too_long)
            TRIALS[name](random.Random(f"{name} {seed}"), folder)
        except BaseException:  # whatever it is, the parent tells of it
            report.write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"the process ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return (
        report.read_text()
        if report.is_file()
        else None
        if status == 0
        else f"the process ended with {status}"
    )


def _too_long(*_: object) -> None:
    raise Timeout(f"more than {TIMEOUT} s")


def night(names: list[str], seconds: float, first: int, findings: Path | None) -> int:
    """Runs the trials in turns for that long, and each once at least; the number of findings."""
    end, runs, spent, found = time.monotonic() + seconds, Counter[str](), Counter[str](), 0
    for number in itertools.count():
        name = min(names, key=lambda one: spent[one] / SHARES.get(one, 1.0))
        if time.monotonic() >= end and all(runs[one] for one in names):
            break
        seed, started = first + number, time.monotonic()
        wrong = tried(name, seed)
        runs[name] += 1
        spent[name] += int(1000 * (time.monotonic() - started)) + 1
        if wrong is not None:
            found += 1
            said = (
                f"FINDING {name}, again: python tests/night/night.py --trial {name} --seed {seed}\n{wrong}\n"
            )
            sys.stderr.write(f"\n{said}")
            if findings is not None:
                findings.mkdir(parents=True, exist_ok=True)
                (findings / f"{name}-{seed}.txt").write_text(said)
    for name in names:
        sys.stdout.write(f"{name:18s} {runs[name]:6d} trials in {spent[name] / 1000:.0f} s\n")
    sys.stdout.write(f"from seed {first}: {sum(runs.values())} trials, {found} findings\n")
    return found


def tried(name: str, seed: int) -> str | None:
    """The outcome of a trial in a folder that is gone afterwards."""
    scratch = Path(tempfile.mkdtemp(prefix="night-"))
    (scratch / "trial").mkdir()
    try:
        return outcome(name, seed, scratch / "trial")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument(
        "--trial", action="append", choices=sorted(TRIALS), help="only this one; may be given several times"
    )
    parser.add_argument("--seed", type=int, help="of the one trial that is repeated; else the first of many")
    parser.add_argument("--findings", type=Path, help="a folder for what was found")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    if (
        args.seed is not None
        and args.trial
        and len(args.trial) == 1
        and args.seconds == parser.get_default("seconds")
    ):
        wrong = tried(args.trial[0], args.seed)
        sys.stdout.write(f"{wrong or 'nothing was wrong'}\n")
        raise SystemExit(wrong is not None)
    first = time.time_ns() & 0xFFFFFFF if args.seed is None else args.seed
    raise SystemExit(night(args.trial or list(TRIALS), args.seconds, first, args.findings) > 0)


if __name__ == "__main__":
    main()
