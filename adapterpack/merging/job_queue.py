"""Hands out the jobs of a merge to workers, so that few of them write to the same file at the same time."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence

from .tensor_jobs import Job


class JobQueue:
    """Jobs that are handed out to workers, each one once.

    The next job is one for the files that fewest workers are writing to, since writes into one file wait for each other; among these for
    the file with most left to write, so that all end together. Jobs of one file keep their order.

    Example:
        >>> jobs = [Job(frozenset({name}), 1) for name in "aab"]
        >>> queue = JobQueue(jobs, range(3))
        >>> queue.take(), queue.take(), queue.take(), queue.take()
        (0, 2, 1, None)
    """

    def __init__(self, jobs: Sequence[Job], numbers: Sequence[int]) -> None:
        self._jobs, self._lock = jobs, threading.Lock()
        self._waiting: dict[frozenset[str], deque[int]] = {}
        self._left, self._busy = Counter[frozenset[str]](), Counter[str]()
        for number in numbers:
            self._waiting.setdefault(jobs[number].files, deque()).append(number)
            self._left[jobs[number].files] += jobs[number].nbytes

    def take(self) -> int | None:
        """The number of a job, or None when all are handed out."""
        with self._lock:
            if not self._waiting:
                return None
            files = min(self._waiting, key=lambda files: (sum(self._busy[file] for file in files), -self._left[files]))
            number = self._waiting[files].popleft()
            if not self._waiting[files]:
                del self._waiting[files]
            self._left[files] -= self._jobs[number].nbytes
            self._busy.update(files)
            return number

    def done(self, number: int) -> None:
        """Notes that job ``number`` is no longer writing."""
        with self._lock:
            self._busy.subtract(self._jobs[number].files)
