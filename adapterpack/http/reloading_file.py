"""What some files say, read again while a server runs whenever one of them has changed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from ..errors import AdapterpackError

LOOK_SECONDS = 1.0
"""How often the files are looked at, at most."""
_AGAIN_SECONDS = 10.0
"""After which files that could not be read are read again, changed or not."""
T = TypeVar("T")
_LOG = logging.getLogger("adapterpack.http")


class ReloadingFile(Generic[T]):
    """The value that ``read`` makes of some files, ``what`` in words. Where they cannot be read the value
    stays as it was: the log says so as long as it lasts, and :attr:`unread_seconds` for how long that has
    been.

    Raises:
        AdapterpackError: as ``read``, the first time.
    """

    def __init__(self, what: str, paths: Sequence[Path], read: Callable[[], T]) -> None:
        self._what, self._paths, self._read = what, tuple(paths), read
        self._state = self._file_states()
        self.latest = read()
        """What the files said when they were last looked at."""
        self._looked = self._tried = 0.0
        self._unread_since: float | None = None
        self._reading: asyncio.Future[None] | None = None

    @property
    def value(self) -> T:
        """What the files say; they are looked at here, and not more often than every second."""
        if self._must_read():
            self._read_again()
        return self.latest

    async def look(self) -> None:
        """Has :attr:`latest` say what the files say, as ``value`` does, and reads them on another thread.
        Who comes meanwhile waits, too: nobody is answered by what they said before.
        """
        if self._reading is None and self._must_read():
            self._reading = asyncio.ensure_future(asyncio.to_thread(self._read_again))
            self._reading.add_done_callback(self._finish_reading)
        if self._reading is not None:
            await asyncio.shield(self._reading)

    @property
    def unread_seconds(self) -> float:
        """For how long the files could not be read; 0 where they can."""
        return 0.0 if self._unread_since is None else time.monotonic() - self._unread_since

    def _finish_reading(self, reading: asyncio.Future[None]) -> None:
        self._reading = None

    def _must_read(self) -> bool:
        """Whether the files have to be read again. They are looked at every second."""
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
        except Exception as error:  # whatever it is, what was said must not count for ever without a word
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
        """Changes whenever one of the files does."""
        return tuple(_state(path) for path in self._paths)


def _state(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()  # reading it says what is wrong
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
