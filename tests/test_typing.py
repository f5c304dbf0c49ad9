"""What type checkers see of the public names: signatures and classes, nowhere ``Any``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import adapterpack

ROOT = Path(__file__).parents[1]


def checked(*files: Path) -> str:
    """What mypy prints of these files in strict mode, by the project's own configuration."""
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        *map(str, files),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_project_that_uses_the_package_is_type_checked_and_no_public_name_is_any(tmp_path: Path) -> None:
    """``mypy --strict`` accepts a sample project, and reveals a signature, a class or a module for every
    public name.
    """
    names = sorted(adapterpack.__all__)
    reveal = tmp_path / "reveal.py"
    reveal.write_text(
        "import adapterpack\n" + "".join(f"reveal_type(adapterpack.{name})\n" for name in names), "utf-8"
    )
    out = checked(ROOT / "tests" / "downstream" / "line.py", reveal)
    types = re.findall(r'note: Revealed type is "(.*)"$', out, re.MULTILINE)
    assert len(types) == len(names)
    known = dict(zip(names, types, strict=True))
    assert {
        name: shown
        for name, shown in known.items()
        if not shown.startswith(("def (", "Overload(", "types.ModuleType"))
        and shown not in ("str", "builtins.str")
    } == {}
    for name in ("LoRA", "Session", "Pack", "Store"):
        assert re.search(rf"-> adapterpack\.[\w.]+\.{name}$", known[name]), known[name]
    for name in ("merge", "compose", "export", "train", "validate"):
        assert not known[name].endswith("-> Any"), known[name]
