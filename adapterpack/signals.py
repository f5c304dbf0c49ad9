"""Turns signals that ask a process to end into exceptions, so that work in progress cleans up after
itself.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Ctrl-C; the signal of ``kill`` and of schedulers; and the end of the terminal."""
_AGAIN = 1.0
"""Seconds within which a second signal is ignored, so that a second Ctrl-C does not interrupt the
clean-up.
"""
_before_fork: dict[int, object] = {}


class Ended(KeyboardInterrupt):
    """A signal of :data:`ENDING` asked the process to end.

    Example:
        >>> Ended(signal.SIGTERM).exit_code, Ended(signal.SIGTERM).word
        (143, 'ended by SIGTERM')
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """The exit status that shells report for a process ended by such a signal."""
        return 128 + self.number

    @property
    def word(self) -> str:
        """What happened, for messages."""
        return "interrupted" if self.number == signal.SIGINT else f"ended by {self.number.name}"


def end_at_once(number: int, frame: FrameType | None) -> None:
    """Ends the process immediately, as the handler before anything has begun that needs clean-up."""
    ended = Ended(number)
    with suppress(OSError):
        os.write(2, f"{ended.word}; nothing was left behind\n".encode())
    os._exit(ended.exit_code)


class Raising:
    """A signal handler that raises, but not again while the first exception is probably still cleaning up.
    ``ended`` is the last exception raised.
    """

    ended: Ended | None = None

    def __init__(self) -> None:
        self._last = -_AGAIN

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Raises :class:`Ended`.

        Raises:
            Ended: at the first signal, and at another one after a while.
        """
        now = time.monotonic()
        if now - self._last >= _AGAIN:
            self._last = now
            self.ended = Ended(number)
            raise self.ended


@contextmanager
def raised() -> Iterator[Raising]:
    """Makes signals of :data:`ENDING` raise :class:`Ended` in the main thread, inside the block.

    Signals that the caller ignores or handles, and all signals if another thread calls, keep their handlers.
    """
    handler = Raising()
    ours = threading.current_thread() is threading.main_thread()
    usual = (signal.SIG_DFL, signal.default_int_handler, end_at_once)
    before = (
        {number: found for number in ENDING if (found := signal.getsignal(number)) in usual} if ours else {}
    )
    _before_fork.update(before)
    for number in before:
        signal.signal(number, handler)
    try:
        yield handler
    finally:
        # After a signal the process is about to end; leave the handlers in place.
        if handler.ended is None:
            for number, found in before.items():
                signal.signal(number, found)
            _before_fork.clear()


def _in_child() -> None:
    """Restores the handlers in a forked process, such as a data loader's worker, which ends like any other:
    its parent reports what happened.
    """
    for number, found in _before_fork.items():
        signal.signal(number, found)  # type: ignore[arg-type]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


@contextmanager
def taken(handle: Callable[[Callable[[], None]], None], signals: Collection[int] = ENDING) -> Iterator[None]:
    """Calls ``handle`` instead of raising for these ``signals``, inside the block; ``handle`` gets a function
    that raises after all.

    Nothing changes in threads other than the main one, or where signals do not raise.
    """
    ours = threading.current_thread() is threading.main_thread()
    before = (
        {
            number: found
            for number in signals
            if (found := signal.getsignal(number)) is signal.default_int_handler or isinstance(found, Raising)
        }
        if ours
        else {}
    )

    def instead(number: int, frame: FrameType | None) -> None:
        found = before[number]
        assert callable(found)
        handle(lambda: found(number, frame))

    for number in before:
        signal.signal(number, instead)
    try:
        yield
    finally:
        for number, found in before.items():
            signal.signal(number, found)


_kept: list[Any] = []
"""Objects that the operating system calls, which must not be garbage-collected."""


def end_where_files_are_cut_short(report: Callable[[str], None], exit_code: int) -> None:
    """From now on, ends the process with ``exit_code`` after calling ``report`` with the path, if a
    memory-mapped file is truncated while it is read.

    Otherwise the system would end it by SIGBUS without a message; the read cannot be resumed. This changes
    the whole process, so it is for commands only.
    """
    if not hasattr(signal, "SIGBUS") or _kept:
        return
    import ctypes  # noqa: PLC0415 - whoever maps files has imported it

    def handle(number: int) -> None:
        try:
            report(_cut_short())
        finally:
            os._exit(exit_code)

    # A handler in Python runs after the interrupted instruction, which here never finishes; so register a C
    # callback.
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    ctypes.CDLL(None).signal(int(signal.SIGBUS), handler)
    _kept.append(handler)


def _cut_short() -> str:
    """Returns the path of the mapped file that is shorter than its mapping, or words if that is unknown."""
    try:
        for line in Path("/proc/self/maps").read_text("utf-8", "replace").splitlines():
            place, _, offset, _, inode, *path = line.split(maxsplit=5)
            start, stop = (int(end, 16) for end in place.split("-"))
            # parts of a library may be longer than its file
            if not path or not int(inode) or ".so" in path[0]:
                continue
            if Path(path[0]).stat().st_size <= int(offset, 16) + stop - start - 4096:
                return path[0]
    except (OSError, ValueError):
        pass
    return "a file that is mapped into memory"
