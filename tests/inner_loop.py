"""The inner loop, ``pytest -m fast``: what it selects, and what keeps it short.

It runs the tests that are marked ``fast`` and neither ``long`` nor sampled out. Where a whole module has the mark, test functions whose
cases took more than :data:`SLOW` together when they were last measured are left out: ``golden/slow.tsv`` lists them. A function with a mark
of its own always runs. ``--measure`` writes the table from the run that it is given to, and keeps the lines of functions that did not run.
Any run in which the tests of the inner loop keep a processor busy for more than :data:`ROOM` fails, and says which took the most; what else
the machine does counts little there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

SLOW = 0.5
"""Seconds, setup included, that all cases of a function in the inner loop may take together."""
ROOM = 200.0
"""Seconds of a processor that all its tests may take, half as much again as is usual; two processes share them."""
TABLE = Path(__file__).parent / "golden" / "slow.tsv"
SELECTED = "fast and not long and not slow"
CHOSEN = "chosen for the inner loop"


def function_of(nodeid: str) -> str:
    """The test function of a case: ``tests/test_merge.py::test_law[a-b]`` -> ``tests/test_merge.py::test_law``."""
    return nodeid.partition("[")[0]


def table() -> dict[str, float]:
    """Functions that are too slow for the inner loop, and their seconds."""
    lines = TABLE.read_text("utf-8").splitlines() if TABLE.exists() else []
    return {name: float(seconds) for seconds, name in (line.split("\t") for line in lines)}


class InnerLoop:
    """Selects the inner loop, and adds up what its tests take in a run."""

    def __init__(self, config: pytest.Config) -> None:
        self.measure: bool = config.option.measure
        self.seconds, self.busy = Counter[str](), Counter[str]()  # of the clock, and of a processor
        self.before = 0.0
        self.slow = table()
        self.first = not hasattr(config, "workerinput")  # of the processes of pytest-xdist; the others send it their reports
        if config.option.markexpr == "fast":
            config.option.markexpr = SELECTED

    def pytest_ignore_collect(self, collection_path: Path, config: pytest.Config) -> bool | None:
        """A module that never says ``fast`` is not imported for the inner loop: importing all takes as long as running its tests."""
        module = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
        if config.option.markexpr == SELECTED and module and "mark.fast" not in collection_path.read_text("utf-8"):
            return True
        return None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Tests that the table lists are ``slow``, unless they were chosen: have the mark ``fast`` themselves."""
        for item in items:
            if any(mark.name == "fast" for mark in item.own_markers):
                item.keywords[CHOSEN] = True
            elif function_of(item.nodeid) in self.slow:
                item.add_marker(pytest.mark.slow)

    def pytest_runtest_logstart(self) -> None:
        """What was before a test is not the test's."""
        self.before = sum(os.times()[:4])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, Any, Any]:
        """Adds to a report how long this process, and those that it started and that ended, kept a processor busy."""
        report = yield
        now = sum(os.times()[:4])
        report.busy, self.before = now - self.before, now
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Adds up the seconds of each function of the inner loop, and of each that is in it if it is quick."""
        if "fast" in report.keywords and "long" not in report.keywords:
            name = function_of(report.nodeid)
            self.busy[name] += getattr(report, "busy", 0.0)  # a process that died tells none
            if CHOSEN not in report.keywords:
                self.seconds[name] += report.duration

    def taken(self) -> Counter[str]:
        """How long the functions that the inner loop has kept a processor busy."""
        return Counter({name: took for name, took in self.busy.items() if name not in self.slow})

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Writes the table where that was asked for; fails a run whose inner loop takes too long."""
        if not self.first:
            return
        if self.measure:
            root = TABLE.parents[2]
            kept = {name: took for name, took in self.slow.items()
                    if name not in self.seconds and (root / name.partition("::")[0]).exists()}
            self.slow = kept | {name: took for name, took in self.seconds.items() if took > SLOW}
            TABLE.write_text("".join(f"{took:.1f}\t{name}\n" for name, took in sorted(self.slow.items())), "utf-8")
        if self.taken().total() > ROOM and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Says what took the most, where there is no room for it."""
        taken = self.taken()
        if taken.total() > ROOM:
            most = ", ".join(f"{name} {took:.1f} s" for name, took in taken.most_common(5))
            terminalreporter.write_line(
                f"ERROR: the tests of the inner loop took {taken.total():.0f} s, and {ROOM:.0f} s is the most: {most}. `make measure` "
                "leaves out those that are slow; where many are quick, take the mark `fast` from a module", red=True)
