"""What the README shows around a pack works as it stands there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "packs"))
import make_bad as bad

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parent.parent


def test_the_commands_and_the_code_run(tmp_path: Path) -> None:
    """Every line of the section, one after the other, on a pack packs/tickets; each file that they name is there afterwards."""
    section = (ROOT / "README.md").read_text("utf-8").split("## Around a pack\n")[1].split("\n## ")[0]
    commands = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    code = section.split("```python\n")[1].split("```")[0]
    assert len(commands) >= 7
    (tmp_path / "packs").mkdir()
    bad.good(tmp_path / "packs" / "tickets")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ADAPTERPACK_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    for command in commands:
        program, _, rest = command.partition(" ")
        words = [sys.executable, "-m", "adapterpack", *rest.split()] if program == "adapterpack" else command.split()
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("tickets.onnx_adapter", "tickets.sarif", "packs/tickets/adapterpack.sig.json", "cache/store/packs"):
        assert (tmp_path / name).exists(), name
