"""The child process of a sandbox: calls one function for each message on its socket. It imports as little as
possible.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ..library_errors import reason
from .limits import DONE, FAILED, HEAD, LIMIT, MEMORY, OVER_MEMORY, SandboxLimits, peak_memory

try:
    import resource
except ImportError:  # without it only the parent's clock limits a call
    resource = None  # type: ignore[assignment]

_SOCKET = 0
_STATM = Path("/proc/self/statm")
_GLANCE = 0.01


_inside = False


def is_inside() -> bool:
    """Returns whether this process is a sandbox, so that code in it needs no further one."""
    return _inside


def main(function: str, memory: str, seconds: str, answer: str) -> None:
    """Serves calls of ``function``, ``module:name`` in adapterpack, until the parent closes its socket or
    dies.
    """
    global _inside  # noqa: PLW0603 - it stays so for the life of this process
    _inside = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and then closes its socket
    module, _, name = function.partition(":")
    run: Callable[[bytes], bytes] = getattr(importlib.import_module(module), name)
    limits = SandboxLimits(int(memory), float(seconds), int(answer))
    _limit_memory(limits.memory)
    _send(DONE, b"")  # ready
    while head := _read(HEAD.size):
        data = _read(HEAD.unpack(head)[1])
        _limit_time(limits.seconds)
        kind, result = _answer(run, data, limits.answer)
        _limit_time(0)
        _send(kind, result)


def _answer(run: Callable[[bytes], bytes], data: bytes, most: int) -> tuple[bytes, bytes]:
    try:
        result = run(data)
    except (MemoryError, SystemError):  # parts of CPython turn a failed allocation into SystemError
        return MEMORY, b""
    except KeyboardInterrupt:
        raise
    except (OverflowError, RecursionError) as error:
        return LIMIT, reason(error).encode("utf-8", "backslashreplace")
    except BaseException as error:  # a panic in Rust code is no Exception
        return FAILED, reason(error).encode("utf-8", "backslashreplace")
    return (
        (DONE, result) if len(result) <= most else (LIMIT, f"its result is larger than {most} bytes".encode())
    )


def _limit_memory(more: int) -> None:
    """Forbids core files, and limits the address space to ``more`` bytes above the current size. Where the
    system does not enforce that, as on macOS, a thread watches the memory in use.
    """
    if resource is None:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        size = int(_STATM.read_bytes().split()[0]) * resource.getpagesize()
    except FileNotFoundError:
        threading.Thread(target=_watch_memory, args=((peak_memory() or 0) + more,), daemon=True).start()
        return
    resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))


def _watch_memory(most: int) -> None:
    """Ends the process once it has used more than ``most`` bytes. Checks periodically, so it may exceed the
    limit briefly.
    """
    while (peak_memory() or 0) <= most:
        time.sleep(_GLANCE)
    os._exit(OVER_MEMORY)


def _limit_time(seconds: float) -> None:
    """Limits the CPU time of all threads from now on, after which the system ends the process; 0 removes the
    limit.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _read(size: int) -> bytes:
    parts = []
    while size:
        part = os.read(_SOCKET, min(size, 1 << 20))
        if not part:
            sys.exit()
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _send(kind: bytes, data: bytes) -> None:
    left = memoryview(HEAD.pack(kind, len(data)) + data)
    while left:
        left = left[os.write(_SOCKET, left) :]
