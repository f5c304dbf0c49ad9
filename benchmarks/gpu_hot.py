"""Loads of an adapter that the bundle does not have while rows run: how long a load takes, and the longest
pause between two tokens of a running row meanwhile, beside the longest without a load.

The pack is looked through, compared with base and digests, and proved by its canary on a thread of its own;
then a request names it. The pauses are those up to that request's first token.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from threading import Thread

import numpy as np
from gpu_plan import Plan, Row, Table

from adapterpack.runtime.engine.engine import DecoderEngine

PROMPT = 64
LENGTH = 2048
"""Positions of a row; one that has filled them begins anew."""
NAME = "loaded"


class Running:
    """An engine whose rows never end; ``times`` are the seconds at which the first of them got a token."""

    def __init__(self, engine: DecoderEngine, names: list[str]) -> None:
        self.engine, self.times = engine, list[float]()
        self._rng, self._names = np.random.default_rng(0), dict[int, str]()
        for name in names:
            self._names[self.add(name)] = name
        self._first = min(self._names)

    def add(self, name: str, **options: int) -> int:
        """A request with a random prompt, that ends with its positions unless told otherwise."""
        prompt = [int(token) for token in self._rng.integers(1, 60, PROMPT)]
        return self.engine.add(prompt, name, **{"max_new_tokens": LENGTH, "ignore_eos": True, **options})

    def step(self) -> list[int]:
        """One step; the requests that got a token."""
        events = self.engine.step()
        now = time.perf_counter()
        for event in events:
            if event.error is not None:
                raise event.error
            if event.request == self._first:
                self.times.append(now)
            if event.finish_reason is not None and (name := self._names.pop(event.request, None)) is not None:
                again = self.add(name)
                self._names[again] = name
                self._first = again if event.request == self._first else self._first
        return [event.request for event in events if event.token is not None]

    def longest(self) -> float:
        """Milliseconds of the longest pause since it was asked for last."""
        pauses, self.times = np.diff(self.times), self.times[-1:]
        return 1e3 * float(pauses.max()) if len(pauses) else 0.0


def measure(plan: Plan) -> Table:
    """Loads and pauses with as many rows as the plan has at most."""
    count, table = max(plan.args.rows), Table([], [])
    *known, fresh = plan.packs
    size = sum(file.stat().st_size for file in fresh.rglob("*") if file.is_file()) / 1e6
    for form in plan.args.forms:
        bundle = plan.bundle(form, "bank")
        for kind, device in plan.devices.items():
            options = {"max_rows": count + 1, "max_length": LENGTH, "prefix_budget": 0, "lookup_tokens": 0}
            engine = DecoderEngine(bundle, device, **options)
            running = Running(engine, [known[row % len(known)].name for row in range(count)])
            found = _measured(running, fresh, plan.args.runs, plan.args.loads)
            table.rows.append({"form": form, "steps": kind, "rows": count, "MB": size, **found})
    return table


def _measured(running: Running, fresh: Path, runs: int, loads: int) -> Row:
    adapters = running.engine.adapters
    while len(running.times) < runs:  # prompts, and captures
        running.step()
    running.longest()
    while len(running.times) < runs + 1:
        running.step()
    steps = 1e3 * np.diff(running.times)
    running.longest()
    took, pauses, firsts = list[float](), list[float](), list[float]()
    for _ in range(loads):
        asked, failed = list[int](), list[Exception]()

        def load(asked: list[int] = asked, failed: list[Exception] = failed) -> None:
            try:
                started = time.perf_counter()
                adapters.load(fresh, NAME)
                took.append(1e3 * (time.perf_counter() - started))
                asked.append(running.add(NAME, max_new_tokens=4))
            except Exception as error:
                failed.append(error)

        started = time.perf_counter()
        thread = Thread(target=load)
        thread.start()
        while not failed and not {*running.step()}.intersection(asked):
            pass
        firsts.append(1e3 * (time.perf_counter() - started))
        pauses.append(running.longest())
        thread.join()
        if failed:
            raise failed[0]
        while asked[0] in running.step():
            pass
        adapters.unload(NAME)
        running.longest()
    return {
        "step ms": median(steps),
        "longest step ms": max(steps),
        "first load ms": took[0],
        "load ms": median(took),
        "to first token ms": median(firsts),
        "longest pause ms": max(pauses),
        "median pause ms": median(pauses),
    }
