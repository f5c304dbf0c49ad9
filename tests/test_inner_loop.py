"""``pytest -m fast`` selects what ``inner_loop.py`` says, and ``--measure`` which of its tests are slow."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

CONFTEST = """
import pytest
from inner_loop import InnerLoop

def pytest_addoption(parser):
    parser.addoption("--measure", action="store_true")

def pytest_configure(config):
    config.pluginmanager.register(InnerLoop(config))

@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    outcome.get_result().duration = float(item.function.__doc__) if call.when == "call" else 0.0
"""
"""Where each test is told to take as long as it says."""
WHOLE = """
import pytest
pytestmark = pytest.mark.fast

def test_quick(): "0.1"

@pytest.mark.parametrize("case", [1, 2])
def test_takes_long(case): "0.3"

@pytest.mark.fast
def test_chosen(): "0.6"

@pytest.mark.long
def test_long(): "0.6"
"""
UNMARKED = "raise RuntimeError('this is not imported for the inner loop')"
SETTINGS = "[pytest]\naddopts = -m 'not long'\nmarkers =\n    long\n    fast\n    slow\n"


def test_what_it_selects_and_measures(tmp_path: Path) -> None:
    """Real runs of two modules, in two processes and in one: a module without the mark is not imported, and
    long tests are never in it; a function whose cases take long together is, until the run is measured; one
    that has the mark itself stays.
    """
    tests = tmp_path / "tests"
    (tests / "golden").mkdir(parents=True)
    shutil.copyfile(Path(__file__).with_name("inner_loop.py"), tests / "inner_loop.py")
    table = tests / "golden" / "slow.tsv"
    table.write_text("9.0\ttests/test_deleted.py::test_of_old\n9.0\ttests/test_unmarked.py::test_not_run\n")
    for name, text in (
        ("tests/conftest.py", CONFTEST),
        ("tests/test_whole.py", WHOLE),
        ("tests/test_unmarked.py", UNMARKED),
        ("pytest.ini", SETTINGS),
    ):
        (tmp_path / name).write_text(text)

    def ran(*options: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "pytest", "-m", "fast", "-rA", *options]
        # but for xdist they only take time
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
            environment.pop(name, None)
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600, env=environment
        )
        return done.returncode, done.stdout

    code, said = ran("--measure", "-p", "xdist", "-n", "2", "--dist", "loadfile")
    assert code == 0 and "4 passed" in said, said
    (kept, added) = table.read_text().splitlines()
    assert kept == "9.0\ttests/test_unmarked.py::test_not_run"
    assert added == "0.6\ttests/test_whole.py::test_takes_long"
    code, said = ran()
    assert code == 0 and "2 passed" in said and "test_takes_long" not in said, said
