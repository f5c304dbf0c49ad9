"""How many threads a computation gets, and how much of the processors this process may use."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ...io.threads import cores
from ..check import CHECKS, Check, Looked, Problem

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def _look() -> Looked:
    usable, quota = cores(), _quota()
    facts = {
        "processors": os.cpu_count(),
        "usable": usable,
        "quota": quota,
        "variables": [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ],
    }
    if quota is None or quota >= usable:
        return Looked(facts)
    least = max(1, round(quota))
    return Looked(
        facts,
        (
            Problem(
                f"this container may use {quota:g} processors and sees {usable}: libraries start a thread "
                "for each of these, which then wait for each other",
                f"give --threads {least}, and set OMP_NUM_THREADS={least}",
            ),
        ),
    )


def _quota() -> float | None:
    """The processors' time in a second that the container may use; None without a limit, or where none can be
    read.
    """
    with suppress(OSError, ValueError):
        allowed, period = _QUOTA.read_text("ascii").split()
        return None if allowed == "max" else int(allowed) / int(period)
    return None


CHECKS.register(Check(name="threads", title="Processors and threads", rank=50, look=_look))
