"""What one input costs, measured: the processor's time, and how far the memory of the process rises above
what it was before.
"""

from __future__ import annotations

import ctypes
import resource
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HANG = 1.0
"""Seconds of processor time that one input may take."""
STILL = 60
"""Seconds after which something that takes no time, as a wait for a lock or a pipe, counts as a hang."""
MEMORY = 64 << 20
"""Bytes by which the process may rise above its size before the input, and the input's own."""
CEILING = 1 << 30
"""Bytes of further address space: a demand beyond it fails at once, instead of taking the machine down."""

_STATUS = Path("/proc/self/status").open("rb", buffering=0)  # noqa: SIM115 - as long as the process
_RESET = Path("/proc/self/clear_refs").open("wb", buffering=0)  # noqa: SIM115
_LIBC = ctypes.CDLL(None)


class Hang(BaseException):
    """The input took too long; no ``except Exception`` may hide it."""


def begin() -> None:
    """Puts the watch on this process."""

    def too_long(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGPROF, too_long)
    signal.signal(signal.SIGALRM, too_long)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + CEILING,) * 2)


def memory(field: bytes = b"VmHWM:") -> int:
    """The most memory that this process held at once since that was reset, in bytes; ``VmRSS:`` is what it
    holds now.
    """
    _STATUS.seek(0)
    return int(_STATUS.read(4096).partition(field)[2].split()[0]) << 10


def trim() -> None:
    """Gives memory that is free back to the system, so that taking it again shows."""
    _LIBC.malloc_trim(0)


class Cost:
    """``with Cost() as cost``: what the block took, in ``seconds`` and in ``bytes`` above what the process
    held before.

    Raises:
        Hang: it took too long, in the block.
    """

    seconds = 0.0
    bytes = 0

    def __enter__(self) -> Self:
        _RESET.write(b"5")  # the highest is what it is now
        self._before, self._start = memory(b"VmRSS:"), time.process_time()
        signal.setitimer(signal.ITIMER_PROF, HANG)
        signal.setitimer(signal.ITIMER_REAL, STILL)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.seconds, self.bytes = time.process_time() - self._start, memory() - self._before
