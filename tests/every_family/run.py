"""Takes types through the line, each in a process of its own: ``.ci/families --help``.

What is measured is appended to a file of results, from which a run that was stopped goes on; ``--write`` puts it
into the table and renews the page, and without it the run fails where an outcome is not the table's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from adapterpack.errors import AdapterpackError
from adapterpack.tasks.task import TASKS

from . import page, table
from .table import Outcome, shortened
from .types import every_type, group_of

SECONDS, MEMORY = 120, 6 << 30
"""Of processor and of address space beyond what is imported, for one type."""
PATIENCE = 300
"""Seconds by the clock in which it may use no processor: a machine that does other things takes any time."""


def measured(task: str, kind: str, only: Sequence[str] = ()) -> Outcome:
    """Takes one type through the stages, in this process."""
    from .stages import STAGES, Case

    with tempfile.TemporaryDirectory(prefix="families-") as folder:
        case, passed, reason = Case(task, kind, Path(folder)), list[str](), ""
        for stage in STAGES:
            if not set(stage.needs) <= set(passed) or (only and stage.name not in only):
                continue
            if stage.task not in (None, task):
                continue
            _note(stage.name, passed, reason, time.process_time())
            try:
                stage.run(case)
                passed.append(stage.name)
            except Exception as error:  # the outcome
                reason = reason or f"{stage.name}: {shortened(_said(error), Path(folder))}"
    return outcome(task, kind, passed, reason)


def _said(error: Exception) -> str:
    """What went wrong, without the place and the remedy; of several frontends what the one says that knows all
    types.
    """
    if isinstance(error, AdapterpackError):
        last = (error.found or "").rpartition("; transformers: ")
        return (
            f"{error.what}: {last[2].partition('; rereading: ')[0]}" if last[1] else error.placeless_sentence
        )
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, AssertionError) and text else f"{type(error).__name__}: {text}"


def outcome(task: str, kind: str, passed: Sequence[str], reason: str) -> Outcome:
    """The level that follows from the stages that passed: all of its own and of those below."""
    import transformers

    from .stages import STAGES

    level = 0
    for candidate in range(1, 5):
        if not all(stage.name in passed for stage in STAGES if stage.level == candidate):
            break
        level = candidate
    level += level == 4 and (task, kind) in page.REAL
    return Outcome(task, kind, transformers.__version__, level, tuple(passed), reason)


_noted: list[Any] = []


def _note(*reached: Any) -> None:
    for pipe in _noted:
        pipe.send(reached)


def _child(task: str, kind: str, only: Sequence[str], pipe: Any) -> None:
    """One type, within its limits; as each stage begins the pipe gets its name, those that passed, the first
    failure and the seconds of processor spent so far, and at the end the outcome.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    spent = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, spent + SECONDS + 5))
    _noted.append(pipe)
    found = measured(task, kind, only)
    _note("end", found.passed, found.reason, time.process_time())
    pipe.send(found)
    pipe.close()
    os._exit(0)  # threads of sessions do not matter any more


class _Running:
    """A child and what it said so far."""

    def __init__(self, task: str, kind: str, only: Sequence[str]) -> None:
        context = multiprocessing.get_context("fork")
        self.task, self.kind = task, kind
        self.reached: tuple[str, Sequence[str], str, float] = ("start", (), "", 0.0)
        self.seconds: dict[str, float] = {}
        """Of processor, by stage."""
        self._pipe, other = context.Pipe(duplex=False)
        self._process = context.Process(target=_child, args=(task, kind, only, other))
        self._process.start()
        other.close()
        self.began = time.monotonic()
        self._used, self._moved = list[str](), self.began

    def outcome(self) -> Outcome | None:
        """What became of it, or None while it runs."""
        try:
            while self._pipe.poll():
                said = self._pipe.recv()
                if isinstance(said, Outcome):
                    self._process.join()
                    return said
                before, *_, begun = self.reached
                if before != "start":
                    self.seconds[before] = round(said[3] - begun, 1)
                self.reached = said
        except EOFError:
            self._process.join()
            return self._broken(f"the process ends with {self._process.exitcode}")
        used = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        if used != self._used:
            self._used, self._moved = used, time.monotonic()
        if time.monotonic() - self._moved <= PATIENCE:
            return None
        self._process.kill()
        self._process.join()
        return self._broken(f"stands still for {PATIENCE} seconds")

    def _broken(self, reason: str) -> Outcome:
        reason = {-24: f"not at an end after {SECONDS} seconds"}.get(self._process.exitcode or 0, reason)
        stage, passed, before, _ = self.reached
        return outcome(self.task, self.kind, passed, before or f"{stage}: {reason}")


@contextmanager
def _imported() -> Iterator[None]:
    """Children find everything imported, and the exporter's table of operators made."""
    import pytest
    import traces
    import transformers

    import adapterpack

    for name in ("onnxruntime", "mobius", "torch.onnx", "every_family.stages"):
        importlib.import_module(name)
    for module in pkgutil.walk_packages(adapterpack.__path__, "adapterpack."):
        if "__main__" not in module.name:
            importlib.import_module(module.name)
    transformers.logging.set_verbosity_error()
    with pytest.MonkeyPatch.context() as patch:
        traces._keep_operators(patch)
        importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry.from_torchlib()
        yield


def run(
    chosen: Sequence[tuple[str, str]], results: Path, jobs: int = 2, only: Sequence[str] = ()
) -> Iterator[Outcome]:
    """The outcomes of these types as they come, each appended to the file of results; at the end where the
    seconds of processor went.
    """
    with _imported():
        waiting, running, count = list(reversed(chosen)), list[_Running](), 0
        spent: Counter[str] = Counter()
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Running(*waiting.pop(), only))
            time.sleep(0.05)
            for child in list(running):
                if (found := child.outcome()) is not None:
                    running.remove(child)
                    count += 1
                    seconds, own = time.monotonic() - child.began, sum(child.seconds.values())
                    spent.update(child.seconds)
                    print(
                        f"{count}/{len(chosen)} {seconds:.0f} s, {own:.0f} of processor, level {found.level}",
                        *found[:2],
                        found.reason,
                        flush=True,
                    )
                    with results.open("a") as file:
                        file.write(json.dumps([*found, child.seconds]) + "\n")
                    yield found
        stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in spent.most_common())
        print(f"{spent.total():.0f} s of processor: {stages}", flush=True)


def known(results: Path) -> dict[tuple[str, str], Outcome]:
    """What a file of results has, the last of each type."""
    lines = results.read_text("utf-8").splitlines() if results.exists() else []
    outcomes = (Outcome._make([*row[:4], tuple(row[4]), row[5], ""]) for row in map(json.loads, lines))
    return {one.key: one for one in outcomes}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog=".ci/families", description=__doc__)
    parser.add_argument("--shard", default="1/1", help="which part of how many, 1/4 for instance")
    parser.add_argument(
        "--task", action="append", default=[], help="only types of this task; may be repeated"
    )
    parser.add_argument("--types", nargs="*", default=[], help="only these types")
    parser.add_argument("--stage", nargs="*", default=[], help="only these stages")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--results", type=Path, default=Path("families-results.jsonl"), help="where a stopped run goes on"
    )
    parser.add_argument("--again", action="store_true", help="also what the results have already")
    parser.add_argument("--write", action="store_true", help="renew the table and the page")
    given = parser.parse_args(arguments)
    number, count = map(int, given.shard.split("/"))
    listed = list(every_type())
    chosen = [
        (task, kind)
        for task, kind in listed[number - 1 :: count]
        if (not given.task or task in given.task) and (not given.types or kind in given.types)
    ]
    done = {} if given.again else known(given.results)
    if left := [key for key in chosen if key not in done]:
        list(run(left, given.results, given.jobs, given.stage))
    found = known(given.results)
    golden = table.read()
    if given.write:
        table.write({**golden, **found}, {key: group_of(TASKS[key[0]], key[1]) for key in listed})
        page.PAGE.write_text(page.render(table.read()), "utf-8")
        return 0
    recorded = {key: one._replace(group="") for key, one in golden.items()}
    different = [found[key] for key in chosen if key in found and recorded.get(key) != found[key]]
    for one in different:
        before = recorded.get(one.key)
        print(f"not as recorded: {one.line()}\n       recorded: {before and before.line()}")
    return 1 if different and not given.stage else 0


if __name__ == "__main__":
    sys.exit(main())
