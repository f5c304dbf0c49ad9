"""Scores a pack with an executable that the user names on the command line."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..io import Say, scratch_folder

_SHOWN = 400


def score_with(executable: str, say: Say) -> Callable[[Any], float]:
    """Returns a function that scores a pack: it writes the pack to a temporary folder, runs ``executable
    FOLDER``, and parses the last printed line as a number. No shell is involved, and no file can name an
    executable.

    Raises:
        ConfigError: the file is not executable, or the run fails or prints no number.
    """
    path = shutil.which(executable) or (
        executable if os.access(executable, os.X_OK) and Path(executable).is_file() else None
    )
    if path is None:
        raise ConfigError(
            "this is not an executable file",
            where="--score",
            found=executable,
            remedy=(
                "give the path of a program that takes a pack's folder and prints a number; more is better"
            ),
        )
    count = 0

    def score(pack: Any) -> float:
        nonlocal count
        count += 1
        with scratch_folder() as folder:
            place = folder / "pack"
            pack.write(place)
            process = subprocess.Popen(
                [str(Path(path).absolute()), str(place)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            try:
                out, err = process.communicate()
            except BaseException:  # an interrupt must not leave the process running
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
        if process.returncode:
            raise ConfigError(
                "the scorer failed",
                where=executable,
                expected="exit code 0",
                found=f"{process.returncode}: {err[-_SHOWN:].strip()}",
                remedy="run it by hand with a pack's folder",
            )
        last = out.strip().rpartition("\n")[2]
        try:
            value = float(last)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ConfigError(
                "the scorer printed no number",
                where=executable,
                expected="a number in the last line",
                found=repr(last[:80]),
                remedy="print the score last; more is better",
            )
        say(f"evaluation {count}: {value:g}")
        return value

    return score
