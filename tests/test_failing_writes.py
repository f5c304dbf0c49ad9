"""A full or broken disk: whichever call fails, the output is whole or absent, and the last words are a sentence."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "failing"))
from failing_writes import hub_with, make, trials, try_all

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler, which makes calls fail")


@pytest.mark.parametrize("command", ["pack", "merge", "sign"])
def test_some_calls_of_a_command_fail(command: str, tmp_path: Path) -> None:
    """The first one, the last one, and one between them."""
    assert try_all([command], make(tmp_path / "made"), most=3, jobs=1, scratch=tmp_path) == []


def test_some_allocations_of_a_command_fail(tmp_path: Path) -> None:
    """Without memory, too, the output is whole or absent, and the last words are no bug report."""
    made = make(tmp_path / "made")
    assert try_all(["merge"], made, most=5, jobs=1, scratch=tmp_path, what="nth_allocation") == []


@pytest.mark.long
def test_every_allocation_of_every_command_fails(tmp_path: Path) -> None:
    made = make(tmp_path / "made")
    names = [each.name for each in trials() if each.name != "pull"]  # which needs a hub, and little memory
    assert try_all(names, made, most=None, jobs=2, scratch=tmp_path, what="nth_allocation") == []


@pytest.mark.long
def test_every_call_of_every_command_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "")  # what it sets is gone afterwards
    made = make(tmp_path / "made")
    (tmp_path / "work").mkdir()
    with hub_with(made / "packs/alpha", tmp_path):
        assert try_all([], made, most=None, jobs=2, scratch=tmp_path) == []
