"""Runs the jobs of a merge on a few workers, which write straight to the right places of the output files."""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ...base import Rounding
from ...io import (
    Progress,
    Scratch,
    StoppedError,
    Ticker,
    one_thread_each,
    open_descriptor,
    reserve,
    write_all,
)
from ..fold import Arithmetic
from .journal import Finished, Journal
from .layout import Shard
from .tensor_jobs import MergeContext, TensorJob


class JobQueue:
    """Jobs that are handed out to workers, each one once.

    The next job is one for the files that fewest workers are writing to, since writes into one file wait for
    each other; among these for the file with most left to write, so that all end together. Jobs of one file
    keep their order.

    Example:
        >>> from types import SimpleNamespace
        >>> jobs = [SimpleNamespace(files=frozenset({name}), nbytes=1) for name in "aab"]
        >>> queue = JobQueue(jobs, range(3))
        >>> queue.take(), queue.take(), queue.take(), queue.take()
        (0, 2, 1, None)
    """

    def __init__(self, jobs: Sequence[TensorJob], numbers: Sequence[int]) -> None:
        self._jobs = jobs
        self._lock = threading.Lock()
        self._waiting: dict[frozenset[str], deque[int]] = {}
        self._left = Counter[frozenset[str]]()
        self._busy = Counter[str]()
        for number in numbers:
            self._waiting.setdefault(jobs[number].files, deque()).append(number)
            self._left[jobs[number].files] += jobs[number].nbytes

    def take(self) -> int | None:
        """Returns the number of a job, or None when all are handed out."""
        with self._lock:
            if not self._waiting:
                return None
            files = min(
                self._waiting, key=lambda files: (sum(self._busy[file] for file in files), -self._left[files])
            )
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


def create_files(shards: Sequence[Shard], folder: Path) -> None:
    """Creates every output file at its full size, with its header; keeps what an earlier run wrote."""
    for shard in shards:
        with open_descriptor(folder / shard.name, os.O_WRONLY | os.O_CREAT) as sink:
            write_all(sink, np.frombuffer(shard.header, np.uint8), 0)
            reserve(sink, shard.size)


def write(
    jobs: Sequence[TensorJob],
    mine: Sequence[int],
    done_before: Finished,
    journal: Journal,
    *,
    header: int,
    safe: bool,
    rounding: Rounding,
    arithmetic: Arithmetic,
    workers: int,
    progress: Progress | None,
) -> Finished:
    """Does the jobs with the numbers ``mine`` that are not in ``done_before``, and returns all that are done.

    ``header`` is the size of all headers in bytes. Memory: a few row blocks for each worker, whatever the
    size of the tensors.

    Raises:
        NonFinite: a result is NaN, or beyond float32; with ``safe``, too large for its dtype.
        OSError: the file system refuses.
    """
    ticker = Ticker(header + sum(jobs[number].nbytes for number in mine), progress)
    ticker.add(header + sum(jobs[number].nbytes for number in mine if number in done_before))
    context = MergeContext(journal.staging, ticker, safe, rounding, arithmetic)
    queue = JobQueue(jobs, [number for number in mine if number not in done_before])

    def work() -> Finished:
        scratch = Scratch()
        done = Finished()
        while (number := queue.take()) is not None:
            try:
                ticker.check()
                with np.errstate(all="ignore"):  # an overflow gives infinity, which the job checks
                    sums = jobs[number].run(context, scratch)
                journal.add(number, sums, jobs[number].files)
            except BaseException:
                ticker.stopped = True
                raise
            finally:
                queue.done(number)
            done[number] = sums
        return done

    with one_thread_each(), ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(work) for _ in range(workers)]
            failures = [error for future in futures if (error := future.exception()) is not None]
        except BaseException:  # an interrupt while waiting
            ticker.stopped = True
            raise
    # the first real failure, not the StoppedError by which the other workers then ended
    for failure in sorted(failures, key=lambda error: isinstance(error, StoppedError)):
        raise failure
    return done_before | {number: sums for future in futures for number, sums in future.result().items()}
