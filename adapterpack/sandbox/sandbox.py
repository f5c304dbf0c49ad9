"""Runs one function of adapterpack on bytes in other processes, within limits of memory and time. Whatever
the bytes do there, the worst outcome is an error.

A process is started by exec, so threads and libraries of this process do not matter. It inherits no open
files, and only the environment variables that Python needs. It ends when its sandbox is closed, when this
process ends in any way, and whenever a call exceeds a limit.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path
from threading import BoundedSemaphore

from ..errors import FormatError, Unsupported
from .limits import DONE, ENDED, FAILED, HEAD, LARGE, LATE, LIMIT, MEMORY, OVER_MEMORY, UNSENT, SandboxLimits

PROCESSES = 4
"""The most processes of one sandbox; further callers wait."""
_LAST_SECONDS = 1.0
_KEPT_VARIABLES = ("TZ", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
_START = (
    "import sys; sys.path[:] = sys.argv[5:]; from adapterpack.sandbox.child import main; main(*sys.argv[1:5])"
)


class OutOfLimits(FormatError):
    """Untrusted input would take more time or memory than permitted. ``reason`` says which limit."""

    def __init__(self, what: str, reason: str, where: object, remedy: str | None) -> None:
        super().__init__(f"{what}: {reason}", where=where, remedy=remedy)
        self.reason = reason


class Sandbox:
    """Calls ``function``, written ``module:name``, which takes and returns bytes, in separate processes.

    ``kept`` processes stay for later calls, which then cost a fraction of a millisecond instead of a process
    start.

    Example:
        >>> Sandbox("base64:b64encode").run(b"abc", "the text cannot be encoded")
        b'YWJj'
    """

    def __init__(self, function: str, limits: SandboxLimits | None = None, kept: int = 1) -> None:
        self.function = function
        self.limits = limits or SandboxLimits()
        self._kept = kept
        self.forget()
        _ALL.add(self)

    def run(self, data: bytes, what: str, where: object = None, remedy: str | None = None) -> bytes:
        """Returns the function's result for ``data``.

        Raises:
            OutOfLimits: the call exceeded a limit. The error has ``what``, ``where``, and the limit.
            FormatError: the function raised an exception. The error has ``what``, ``where``, and its text.
        """
        with self._turns:
            while True:
                waited = bool(self._idle)
                child = self._idle.pop() if waited else _Child(self.function, self.limits)
                try:
                    kind, answer = child.call(data)
                except BaseException:  # on Ctrl-C, too: the result is no longer needed
                    child.close()
                    raise
                if kind != UNSENT or not waited:
                    break
                child.close()  # the idle process had died, which is not this call's fault
            if kind in (DONE, FAILED, LIMIT) and len(self._idle) < self._kept:
                self._idle.append(child)
            else:
                child.close()
        if kind == DONE:
            return answer
        if kind == FAILED:
            raise FormatError(f"{what}: {answer.decode('utf-8', 'replace')}", where=where, remedy=remedy)
        raise OutOfLimits(what, answer.decode("utf-8", "replace") or child.ended_by(kind), where, remedy)

    def close(self) -> None:
        """Ends the idle processes."""
        while self._idle:
            self._idle.pop().close()

    def forget(self) -> None:
        """Resets the sandbox to a state without processes."""
        self._idle: list[_Child] = []
        self._turns = BoundedSemaphore(PROCESSES)


class _Child:
    """A process that is idle or runs a call."""

    def __init__(self, function: str, limits: SandboxLimits) -> None:
        if not sys.executable:
            raise Unsupported("there is no Python to run a sandbox with", expected="sys.executable")
        if os.name != "posix":
            raise Unsupported(
                "what strangers wrote runs in a process of its own, and that needs a POSIX system",
                where=function,
                found=sys.platform,
                remedy="use Linux, macOS, or the Windows Subsystem for Linux",
            )
        self._limits = limits
        paths = [str(Path(__file__).parents[2]), *(path for path in sys.path if path)]
        self._socket, inner = socket.socketpair()
        with inner:
            # -I and -S ignore the environment and site packages; sys.path is passed as arguments instead.
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    "-c",
                    _START,
                    function,
                    str(limits.memory),
                    str(limits.seconds),
                    str(limits.answer),
                    *paths,
                ],
                stdin=inner.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
            )
        _CHILDREN.add(self)
        kind, _ = self._receive(time.monotonic() + limits.deadline)
        if kind != DONE:
            self.close()
            raise Unsupported("a sandbox does not start", where=function, found=self.ended_by(kind))

    def call(self, data: bytes) -> tuple[bytes, bytes]:
        """Sends a call and returns the kind and bytes of the answer. ``UNSENT`` means that the process had
        ended before it read the call.
        """
        until = time.monotonic() + self._limits.deadline
        try:
            self._socket.settimeout(self._limits.deadline)
            self._socket.sendall(HEAD.pack(DONE, len(data)))
            self._socket.sendall(data)
        except TimeoutError:
            return LATE, b""
        except OSError:
            return UNSENT, b""
        return self._receive(until)

    def close(self) -> None:
        """Kills the process."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """Drops the process after a fork, since it belongs to the parent."""
        self._socket.close()
        self._process.returncode = 0

    def ended_by(self, kind: bytes) -> str:
        """Explains why a call of a process, which is closed now, had no answer."""
        memory, seconds, answer = self._limits
        if kind == MEMORY or (kind in (ENDED, UNSENT) and self._process.returncode == OVER_MEMORY):
            return f"it takes more than {memory >> 20} MiB of memory"
        if kind == LATE:
            return f"it takes more than {self._limits.deadline:g} s"
        if kind == LARGE:
            return f"its result is larger than {answer >> 20} MiB"
        code = self._process.returncode
        if code == -getattr(signal, "SIGPROF", 0) != 0:
            return f"it takes more than {seconds:g} s of processor time"
        return (
            "the process that did it ended with "
            f"{signal.Signals(-code).name if code < 0 else f'status {code}'}"
        )

    def _receive(self, until: float) -> tuple[bytes, bytes]:
        try:
            kind, length = HEAD.unpack(self._read(HEAD.size, until))
            return (LARGE, b"") if length > self._limits.answer else (kind, self._read(length, until))
        except TimeoutError:
            return LATE, b""
        except (EOFError, OSError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                # waits for its own exit status, which says why it ended; killing it would hide that
                self._process.wait(_LAST_SECONDS)
            unread = isinstance(error, ConnectionResetError)  # the process had not read all bytes
            return UNSENT if unread else ENDED, b""

    def _read(self, size: int, until: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._socket.settimeout(max(until - time.monotonic(), 0.001))
            part = self._socket.recv(min(size - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)


_ALL: weakref.WeakSet[Sandbox] = weakref.WeakSet()
_CHILDREN: weakref.WeakSet[_Child] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for sandbox in _ALL:
        sandbox.close()


def _forget_all() -> None:
    """Runs in a forked process: drops all children, which belong to the parent and must see its sockets close
    when it dies.
    """
    for child in _CHILDREN:
        child.forget()
    for sandbox in _ALL:
        sandbox.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
