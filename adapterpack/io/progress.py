"""Counts the bytes that all workers have processed, for a progress bar, and stops all workers when one
fails.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

Progress = Callable[[int, int], None]
"""A function that gets (bytes done, bytes in all)."""
Say = Callable[[str], None]
"""A function that tells the user what is being done."""


class StoppedError(Exception):
    """Stops a worker because another one failed or the user interrupted; that error is the one to show."""


class Ticker:
    """Counts the bytes that all workers have processed, reports them, and stops every worker when one has
    failed.
    """

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.stopped = False
        self._done = 0
        self._total = total
        self._progress = progress
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raises in the calling worker if another one has failed."""
        if self.stopped:
            raise StoppedError

    def add(self, nbytes: int) -> None:
        """Adds ``nbytes`` to the count and reports it."""
        if not nbytes:
            return
        with self._lock:
            if self.stopped:
                raise StoppedError
            self._done += nbytes
            if self._progress is not None:
                try:
                    self._progress(self._done, self._total)
                except BaseException:  # an interrupt too; noted under the lock, so that no other call follows
                    self.stopped = True
                    raise
