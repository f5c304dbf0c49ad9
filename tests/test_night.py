"""Some seconds of the random trials of ``make night``, and proof that a trial that fails is told with what
repeats it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NIGHT = ROOT / "tests" / "night"
FAULT = "from adapterpack.fleet import fleet\nfleet.FormatError = ArithmeticError"
"""A reader that falls over a file that is cut short."""


def night(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """A run of the trials in a process of its own, after the statements ``before``."""
    code = (
        f"import sys\nsys.path.insert(0, {str(NIGHT)!r})\nimport night\n{before}\nsys.argv[1:] = "
        f"{list(arguments)!r}\nnight.main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=800,
    )


def test_some_seconds_find_nothing() -> None:
    """Kills of merges and of growing fleets, and changed bytes of packs and fleets: at least one trial of
    each.
    """
    names = ("kill_merge", "kill_compress", "file_pack", "file_fleet")
    done = night(*(word for name in names for word in ("--trial", name)), "--seconds", "4", "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 findings" in done.stdout
    assert not re.search(r" 0 trials", done.stdout)


@pytest.mark.long
def test_what_fails_is_told_and_fails_again(tmp_path: Path) -> None:
    """The command that is printed repeats it; without the fault nothing is wrong."""
    done = night(
        "--trial", "file_fleet", "--seconds", "3", "--seed", "1", "--findings", str(tmp_path), before=FAULT
    )
    assert done.returncode == 1, done.stdout + done.stderr
    again = re.search(r"again: python tests/night/night.py (--trial file_fleet --seed \d+)", done.stderr)
    assert again is not None
    assert (tmp_path / f"file_fleet-{again[1].split()[-1]}.txt").is_file()
    assert night(*again[1].split(), before=FAULT).returncode == 1
    assert night(*again[1].split()).returncode == 0
