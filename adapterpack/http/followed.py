"""What some files say, read again while a server runs whenever one of them has changed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from ..errors import AdapterpackError

LOOK_SECONDS = 1.0
"""How often the files are looked at, at most."""
T = TypeVar("T")
_LOG = logging.getLogger("adapterpack.http")


class Followed(Generic[T]):
    """The value that ``read`` makes of some files, ``what`` in words. Files that cannot be read change nothing, and are logged once.

    Raises:
        AdapterpackError: as ``read``, the first time.
    """

    def __init__(self, what: str, paths: Sequence[Path], read: Callable[[], T]) -> None:
        self._what, self._paths, self._read = what, tuple(paths), read
        self._state = self._seen()
        self._value = read()
        self._looked = 0.0

    @property
    def value(self) -> T:
        """What the files say; they are looked at here, and not more often than every second."""
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._look()
        return self._value

    def _look(self) -> None:
        try:
            state = self._seen()
            if state == self._state:
                return
            self._state = state
            self._value = self._read()
            _LOG.warning("read the %s again: %s", self._what, ", ".join(map(str, self._paths)))
        except AdapterpackError as error:
            _LOG.error("the %s stay as they were: %s", self._what, error)

    def _seen(self) -> tuple[tuple[int, ...], ...]:
        """Changes whenever one of the files does."""
        return tuple(_state(path) for path in self._paths)


def _state(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()  # reading it says what is wrong
    return found.st_mtime_ns, found.st_size, found.st_ino
