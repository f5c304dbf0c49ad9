"""The demo as a user runs it: the real command in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "adapterpack"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One command of ours, whatever it answers."""
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)


def demo(folder: Path, *options: str) -> dict[str, Any]:
    """The demo's JSON; the command must end with 0."""
    done = run("demo", "-o", str(folder), "--json", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
