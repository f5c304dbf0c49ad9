"""The inner loop, ``pytest -m fast``: what it selects, and what keeps it short.

It runs the tests that are marked ``fast`` and neither ``long`` nor sampled out. Where a whole module has the
mark, test functions whose cases took more than :data:`SLOW` together when they were last measured are left
out: ``golden/slow.tsv`` lists them. A function with a mark of its own always runs. ``--measure`` writes the
table from the run that it is given to, and keeps the lines of functions that did not run.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

SLOW = 0.5
"""Seconds, setup included, that all cases of a function in the inner loop may take together."""
TABLE = Path(__file__).parent / "golden" / "slow.tsv"
SELECTED = "fast and not long and not slow"
CHOSEN = "chosen for the inner loop"


def function_of(nodeid: str) -> str:
    """The test function of a case: ``tests/test_merge.py::test_law[a-b]`` ->
    ``tests/test_merge.py::test_law``.
    """
    return nodeid.partition("[")[0]


def table() -> dict[str, float]:
    """Functions that are too slow for the inner loop, and their seconds."""
    lines = TABLE.read_text("utf-8").splitlines() if TABLE.exists() else []
    return {name: float(seconds) for seconds, name in (line.split("\t") for line in lines)}


class InnerLoop:
    """Selects the inner loop, and measures which of its tests are slow."""

    def __init__(self, config: pytest.Config) -> None:
        self.measure: bool = config.option.measure
        self.seconds = Counter[str]()
        self.slow = table()
        # of the processes of pytest-xdist; the others send it their reports
        self.first = not hasattr(config, "workerinput")
        if config.option.markexpr == "fast":
            config.option.markexpr = SELECTED

    def pytest_ignore_collect(self, collection_path: Path, config: pytest.Config) -> bool | None:
        """A module that never says ``fast`` is not imported for the inner loop: importing all takes as long
        as running its tests.
        """
        module = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
        if (
            config.option.markexpr == SELECTED
            and module
            and "mark.fast" not in collection_path.read_text("utf-8")
        ):
            return True
        return None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Tests that the table lists are ``slow``, unless they were chosen: have the mark ``fast``
        themselves.
        """
        for item in items:
            if any(mark.name == "fast" for mark in item.own_markers):
                item.keywords[CHOSEN] = True
            elif function_of(item.nodeid) in self.slow:
                item.add_marker(pytest.mark.slow)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Adds up the seconds of each function that is in the inner loop if it is quick."""
        if "fast" in report.keywords and "long" not in report.keywords and CHOSEN not in report.keywords:
            self.seconds[function_of(report.nodeid)] += report.duration

    def pytest_sessionfinish(self) -> None:
        """Writes the table where that was asked for."""
        if self.measure and self.first:
            root = TABLE.parents[2]
            kept = {
                name: took
                for name, took in self.slow.items()
                if name not in self.seconds and (root / name.partition("::")[0]).exists()
            }
            self.slow = kept | {name: took for name, took in self.seconds.items() if took > SLOW}
            TABLE.write_text(
                "".join(f"{took:.1f}\t{name}\n" for name, took in sorted(self.slow.items())), "utf-8"
            )
