"""Work in processes of its own, which may be killed at any moment."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

TIMEOUT = 300
"""Seconds after which a trial counts as hung."""


class Timeout(BaseException):
    """A trial took too long; no ``except Exception`` may hide it."""


def started(work: Callable[[], object], report: Path) -> int:
    """The process that does the work; what it raises is written to ``report``."""
    report.unlink(missing_ok=True)
    child = os.fork()
    if child:
        return child
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        work()
    except BaseException:
        report.write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def done(work: Callable[[], object], folder: Path) -> float:
    """Does the work in a process of its own; the seconds that it took.

    Raises:
        AssertionError: it failed.
    """
    report, begun = folder / "report.txt", time.monotonic()
    _, status = os.waitpid(started(work, report), 0)
    assert status == 0, f"status {status}\n{report.read_text() if report.is_file() else ''}"
    return time.monotonic() - begun


def killed(work: Callable[[], object], folder: Path, after: float) -> bool:
    """Whether the work was killed after so many seconds; else it was done before.

    Raises:
        AssertionError: it failed by itself.
    """
    report = folder / "report.txt"
    child = started(work, report)
    end = time.monotonic() + after
    while time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"status {status}\n{report.read_text() if report.is_file() else ''}"
    return status != 0
