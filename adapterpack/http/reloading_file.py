"""A value from files that is reloaded whenever one of them changes, for long-running servers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from ..errors import AdapterpackError

LOOK_SECONDS = 1.0
"""The least time between two checks of the files."""
_AGAIN_SECONDS = 10.0
"""The time after which unreadable files are tried again, whether or not they changed."""
T = TypeVar("T")
_LOG = logging.getLogger("adapterpack.http")


class ReloadingFile(Generic[T]):
    """The value that ``read`` makes of some files, which ``what`` names in the log.

    If they cannot be read, the old value stays. The log says so repeatedly, and :attr:`unread_seconds` tells
    for how long.

    Raises:
        AdapterpackError: the first ``read`` fails.
    """

    def __init__(self, what: str, paths: Sequence[Path], read: Callable[[], T]) -> None:
        self._what = what
        self._paths = tuple(paths)
        self._read = read
        self._state = self._file_states()
        self.latest = read()
        """The value as of the last check."""
        self._looked = self._tried = 0.0
        self._unread_since: float | None = None
        self._reading: asyncio.Future[None] | None = None

    @property
    def value(self) -> T:
        """The current value. Checks the files, at most once a second."""
        if self._must_read():
            self._read_again()
        return self.latest

    async def look(self) -> None:
        """Updates :attr:`latest`, reading the files on another thread. Concurrent callers wait for the same
        read, so that none sees the old value.
        """
        if self._reading is None and self._must_read():
            self._reading = asyncio.ensure_future(asyncio.to_thread(self._read_again))
            self._reading.add_done_callback(self._finish_reading)
        if self._reading is not None:
            await asyncio.shield(self._reading)

    @property
    def unread_seconds(self) -> float:
        """For how many seconds the files have been unreadable; 0 if they can be read."""
        return 0.0 if self._unread_since is None else time.monotonic() - self._unread_since

    def _finish_reading(self, reading: asyncio.Future[None]) -> None:
        self._reading = None

    def _must_read(self) -> bool:
        """Returns whether the files must be read again. Checks them at most once a second."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return False
        self._looked, state = now, self._file_states()
        if state == self._state and (self._unread_since is None or now - self._tried < _AGAIN_SECONDS):
            return False
        self._state, self._tried = state, now
        return True

    def _read_again(self) -> None:
        try:
            self.latest = self._read()
        except Exception as error:  # any error is logged, so that an outdated value never stays unnoticed
            self._unread_since = self._unread_since or time.monotonic()
            _LOG.error(
                "the %s stay as they were %.0f s ago: %s",
                self._what,
                self.unread_seconds,
                error if isinstance(error, AdapterpackError) else repr(error),
            )
        else:
            self._unread_since = None
            _LOG.warning("read the %s again: %s", self._what, ", ".join(map(str, self._paths)))

    def _file_states(self) -> tuple[tuple[int, ...], ...]:
        """Returns a value that changes whenever one of the files does."""
        return tuple(_state(path) for path in self._paths)


def _state(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()  # reading it will report the problem
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
