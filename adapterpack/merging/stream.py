"""The bytes of a merge: jobs done by a few workers, from the base's files straight to their place in the output's."""

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
from .job_queue import Turns
from .journal import Done, Journal
from .layout import Shard
from .tensors import Job, Run


def outline(shards: Sequence[Shard], folder: Path) -> None:
    """Every output file at its size, with its header; what was written into one before stays."""
    for shard in shards:
        with opened(folder / shard.name, os.O_WRONLY | os.O_CREAT) as sink:
            write_all(sink, np.frombuffer(shard.header, np.uint8), 0)
            reserve(sink, shard.size)


def write(jobs: Sequence[Job], mine: Sequence[int], known: dict[int, Done], journal: Journal, *, header: int, safe: bool,
          rounding: Rounding, arithmetic: Arithmetic, workers: int, progress: Progress | None) -> dict[int, Done]:
    """Does the jobs with the numbers ``mine`` that are not ``known`` to be done, and returns all that are done.

    ``header`` are the bytes that the files' headers take. Memory: a few row blocks for each worker, whatever the size of the tensors.

    Raises:
        NonFinite: with ``safe``, a result is NaN or infinite.
        OSError: the file system refuses.
    """
    ticker = Ticker(header + sum(jobs[number].nbytes for number in mine), progress)
    ticker.add(header + sum(jobs[number].nbytes for number in mine if number in known))
    run = Run(journal.staging, ticker, safe, rounding, arithmetic)
    turns = Turns(jobs, [number for number in mine if number not in known])

    def work() -> dict[int, Done]:
        scratch, done = Scratch(), dict[int, Done]()
        while (number := turns.take()) is not None:
            try:
                ticker.check()
                with np.errstate(all="ignore"):  # overflow is judged by its result
                    sums = jobs[number].run(run, scratch)
                journal.add(number, sums, jobs[number].files)
            except BaseException:
                ticker.stopped = True
                raise
            finally:
                turns.done(number)
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
    return {number: done for each in (known, *(future.result() for future in futures)) for number, done in each.items()}
