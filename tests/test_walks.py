"""A newcomer who follows a call reads no more files than before: what ``benchmarks/walks.py`` counts may only fall."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import house
import pytest

pytestmark = pytest.mark.long

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "walks.py"


def test_no_walk_passes_through_more_files() -> None:
    """Whoever makes a walk longer writes the new value and the reason into tests/golden/house.tsv."""
    run = subprocess.run(
        [sys.executable, PROGRAM, "--json"], capture_output=True, text=True, check=False, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    walks = {f"walk: {name}": found["files"] for name, found in json.loads(run.stdout).items()}
    record = house.read_record()
    assert set(walks) == {name for name in record if name.startswith("walk: ")}
    assert {name: count for name, count in walks.items() if count > record[name].most} == {}
