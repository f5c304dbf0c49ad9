"""``adapterpack completion``: a real bash completes commands, options, values and files, and no torch is
loaded for it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from shipped_schemas import fits

import adapterpack
from adapterpack.cli.main import COMMANDS, VARIABLE, main

pytestmark = pytest.mark.fast

ROOT = Path(adapterpack.__file__).parents[1]
LINES = {
    "adapterpack compo": {"compose"},
    "adapterpack hub s": {"serve"},
    "adapterpack compose a b --rule tie": {"ties"},
    "adapterpack export base pack --mode b": {"bank"},
    "adapterpack quantize pack --scheme fp": {"fp8", "fp16"},
    "adapterpack convert pack --to koh": {"kohya"},
    "adapterpack run bundle --provider tens": {"tensorrt"},
    "adapterpack validate pac": {"<files>"},
    "adapterpack merge base --no-such": set(),
}
"""What was typed when Tab was pressed, and what bash then offers; for files it is told to do what it does by
itself.
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes(tmp_path: Path) -> None:
    """The function that the script defines is asked as bash asks it; ``compopt`` works only while somebody
    presses a key.
    """
    program = tmp_path / "bin" / "adapterpack"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m adapterpack "$@"\n', "utf-8")
    program.chmod(0o755)
    ask = (
        'eval "$(adapterpack completion bash)"; compopt() { [[ $2 == default ]] && COMPREPLY=("<files>"); }\n'
        "while read -r line; do COMP_WORDS=($line); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=(); "
        '_adapterpack_completion adapterpack; echo "${COMPREPLY[*]}"; done'
    )
    environment = {
        **os.environ,
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["bash", "--norc", "-c", ask],
        input="\n".join(LINES) + "\n",
        text=True,
        capture_output=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
        check=True,
    )
    assert done.stderr == ""
    offered = dict(zip(LINES, (set(line.split()) for line in done.stdout.splitlines()), strict=True))
    assert offered == LINES


def test_completing_loads_no_torch() -> None:
    """Neither the names of the registries nor those of the commands need it; commands are not imported for
    their names.
    """
    code = (
        "import os, sys; from adapterpack.cli.main import main\n"
        "try: main(prog_name='adapterpack')\n"
        "except SystemExit: print(*sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    environment = {
        **os.environ,
        VARIABLE: "bash_complete",
        "COMP_WORDS": "adapterpack export a b --frontend ",
        "COMP_CWORD": "5",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == {
        "plain,external",
        "plain,mobius",
        "plain,rereading",
        "plain,transformers",
    }
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_script(shell: str) -> None:
    done = CliRunner().invoke(main, ["completion", shell, "--json"])
    report = json.loads(done.stdout)
    assert fits(report, "report.v1")
    assert f"{VARIABLE}={shell}_complete" in report["script"]
    assert "completion" in COMMANDS


def test_another_shell_is_refused() -> None:
    done = CliRunner().invoke(main, ["completion", "fsh"])
    assert done.exit_code == 1
    assert "did you mean 'fish'?" in done.stderr
