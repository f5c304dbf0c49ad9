"""Which job a worker does next."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence

from .tensors import Job


class Turns:
    """Jobs dealt out to workers, each one once.

    The next job goes to the files that fewest workers are writing to, since writes into one file wait for each other; among these to the
    one with most left, so that all end together. Jobs of one file keep their order.

    Example:
        >>> jobs = [Job(frozenset({name}), 1) for name in "aab"]
        >>> turns = Turns(jobs, range(3))
        >>> turns.take(), turns.take(), turns.take(), turns.take()
        (0, 2, 1, None)
    """

    def __init__(self, jobs: Sequence[Job], numbers: Sequence[int]) -> None:
        self._jobs, self._lock = jobs, threading.Lock()
        self._lines: dict[frozenset[str], deque[int]] = {}
        self._left, self._busy = Counter[frozenset[str]](), Counter[str]()
        for number in numbers:
            self._lines.setdefault(jobs[number].files, deque()).append(number)
            self._left[jobs[number].files] += jobs[number].nbytes

    def take(self) -> int | None:
        """The number of a job, None when all are dealt out."""
        with self._lock:
            if not self._lines:
                return None
            files = min(self._lines, key=lambda files: (sum(self._busy[file] for file in files), -self._left[files]))
            number = self._lines[files].popleft()
            if not self._lines[files]:
                del self._lines[files]
            self._left[files] -= self._jobs[number].nbytes
            self._busy.update(files)
            return number

    def done(self, number: int) -> None:
        """Says that nobody writes for this job any more."""
        with self._lock:
            self._busy.subtract(self._jobs[number].files)
