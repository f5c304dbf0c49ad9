"""How much room there is where adapterpack writes, and whether it may write there."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from ...io.cache import cache_folder
from ...io.readable import size
from ..check import CHECKS, Check, Looked, Problem

_LITTLE = 1 << 30
"""Bytes: a small model does not fit into less."""


def _look() -> Looked:
    rows, problems = [], []
    for use, wanted in (
        ("caches", cache_folder()),
        ("temporary files", Path(tempfile.gettempdir())),
        ("this folder", Path.cwd()),
    ):
        # it is made when it is needed
        there = next(path for path in (wanted, *wanted.absolute().parents) if path.exists())
        free, writable = shutil.disk_usage(there).free, os.access(there, os.W_OK | os.X_OK)
        rows.append(
            {"for": use, "folder": str(wanted), "free": size(free), "bytes": free, "writable": writable}
        )
        if not writable and use != "this folder":
            problems.append(
                Problem(
                    f"{wanted}, for {use}, cannot be written",
                    "set ADAPTERPACK_CACHE to a folder of yours"
                    if use == "caches"
                    else "set TMPDIR to a folder of yours",
                )
            )
        elif free < _LITTLE:
            problems.append(
                Problem(
                    f"{wanted}, for {use}, has {size(free)} left",
                    "free some space, or: adapterpack doctor --clean",
                )
            )
    return Looked({"folders": rows}, tuple(problems))


CHECKS.register(Check(name="disk", title="Disk", rank=90, look=_look))
