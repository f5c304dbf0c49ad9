"""Runs the jobs of a merge on a few workers, which write straight to the right places of the output files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..base.rounding import Rounding
from ..io.buffers import Scratch
from ..io.byte_ranges import opened, reserve, write_all
from ..io.progress import Progress, StoppedError, Ticker
from ..io.threads import one_thread_each
from .fold.blocks import Arithmetic
from .job_queue import JobQueue
from .journal import Done, Journal
from .layout import Shard
from .tensor_jobs import Job, MergeContext


def create_files(shards: Sequence[Shard], folder: Path) -> None:
    """Creates every output file at its full size, with its header; keeps what an earlier run wrote."""
    for shard in shards:
        with opened(folder / shard.name, os.O_WRONLY | os.O_CREAT) as sink:
            write_all(sink, np.frombuffer(shard.header, np.uint8), 0)
            reserve(sink, shard.size)


def write(jobs: Sequence[Job], mine: Sequence[int], done_before: dict[int, Done], journal: Journal, *, header: int, safe: bool,
          rounding: Rounding, arithmetic: Arithmetic, workers: int, progress: Progress | None) -> dict[int, Done]:
    """Does the jobs with the numbers ``mine`` that are not in ``done_before``, and returns all that are done.

    ``header`` is the size of all headers in bytes. Memory: a few row blocks for each worker, whatever the size of the tensors.

    Raises:
        NonFinite: with ``safe``, a result is NaN or infinite.
        OSError: the file system refuses.
    """
    ticker = Ticker(header + sum(jobs[number].nbytes for number in mine), progress)
    ticker.add(header + sum(jobs[number].nbytes for number in mine if number in done_before))
    context = MergeContext(journal.staging, ticker, safe, rounding, arithmetic)
    queue = JobQueue(jobs, [number for number in mine if number not in done_before])

    def work() -> dict[int, Done]:
        scratch, done = Scratch(), dict[int, Done]()
        while (number := queue.take()) is not None:
            try:
                ticker.check()
                with np.errstate(all="ignore"):  # an overflow shows in the result
                    sums = jobs[number].run(context, scratch)
                journal.add(number, sums, jobs[number].files)
            except BaseException:
                ticker.stopped = True
                raise
            finally:
                queue.done(number)
            done[number] = Done(sums)
        return done

    with one_thread_each(), ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(work) for _ in range(workers)]
            failures = [error for future in futures if (error := future.exception()) is not None]
        except BaseException:  # an interrupt while waiting
            ticker.stopped = True
            raise
    for failure in sorted(failures, key=lambda error: isinstance(error, StoppedError)):
        raise failure
    return {number: done for results in (done_before, *(future.result() for future in futures)) for number, done in results.items()}
