"""Runs a job: answers the lines of a file, and writes the answers to an output that a later run can
resume.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..errors import AdapterpackError, NothingToDo, storage_errors
from ..io import digest, finite, hashing, output_file
from ..readable import things
from ..version import VERSION
from .growing_file import OutputProgress, growing_file, now
from .lines import Line, lines_of

Progress = Callable[[int, int, int], None]
"""Called with (answers so far, their tokens in this run, bytes of input that are done)."""


class Answered(NamedTuple):
    """The answer to a line. ``row`` is written to the output, ``error`` is what is wrong with the line, and
    ``tokens`` is the number of tokens that it took.
    """

    line: Line
    row: Mapping[str, Any]
    error: AdapterpackError | None
    tokens: int


class OfflineJob(Protocol):
    """Answers lines in blocks. ``identity`` holds everything on which its answers depend besides
    the lines.
    """

    block: int
    identity: Mapping[str, Any]

    def answer_block(self, first: int, lines: Iterable[Line], began: int) -> Iterator[Answered]:
        """Yields the answers to a block of lines, in order. ``first`` is the number of its first line among
        those that are not empty; ``began`` is when the job began, in seconds.
        """

    def close(self) -> None:
        """Closes what it has opened."""


OpenJob = Callable[[Line | None], OfflineJob]
"""Opens the job for a file, from its first line if it has one."""


class RowsFailed(AdapterpackError):
    """Some rows of a file could not be run; the output has errors in their places."""

    code = "rows-failed"


def answers(job: OfflineJob, lines: Iterator[Line], done: OutputProgress) -> Iterator[Iterator[Answered]]:
    """Yields the answers to all lines after ``done``, block by block. The caller must exhaust each block."""
    first = done.inputs + 1
    for line in lines:
        yield job.answer_block(first, chain([line], islice(lines, job.block - 1)), done.began)
        first += job.block


def begin(open_job: OpenJob, lines: Iterator[Line]) -> tuple[OfflineJob, Iterator[Line]]:
    """Opens the job for the first line, and returns it with all lines."""
    first = next(lines, None)
    return open_job(first), lines if first is None else chain([first], lines)


def write_stream(
    open_job: OpenJob,
    lines: Iterator[Line],
    out: Path,
    where: str | None,
    progress: Progress,
    keep_going: bool,
) -> OutputProgress:
    """Writes the answers to lines that cannot be read again, such as standard input: the complete file or
    nothing.
    """
    with output_file(out) as path, path.open("wb") as file:
        job, every = begin(open_job, lines)
        with closing(job):
            return _write(job, every, _Plain(file), where, progress, keep_going)


def write_file(
    open_job: OpenJob, source: Path, out: Path, progress: Progress, keep_going: bool
) -> OutputProgress:
    """Writes the answers to the lines of a file, and resumes where an earlier run of the same job stopped.

    Raises:
        StorageError: a file cannot be read or written, the source changes meanwhile, or another process is
            writing the output.
    """
    before = hashing.identity(source)
    where = str(source)
    with ExitStack() as stack:
        file = stack.enter_context(_open_lines(source))
        job, _ = begin(open_job, lines_of(file, where))
        stack.callback(job.close)
        content = hashing.digests({source: hashing.HashedSource.whole(source, before)})[source].hex()
        with growing_file(out, digest({"input": content, "version": VERSION, **job.identity})) as sink:
            file.seek(sink.done.end)
            lines = lines_of(file, where, sink.done.line, sink.done.end)
            return _write(
                job,
                lines,
                sink,
                where,
                progress,
                keep_going,
                lambda: hashing.require_unchanged(source, before),
            )


@contextmanager
def _open_lines(source: Path) -> Iterator[Any]:
    with storage_errors(source):
        file = source.open("rb")
    with file:
        yield file


class _Plain:
    """A file that is written from beginning to end, with the interface of :class:`.GrowingFile`."""

    def __init__(self, file: Any) -> None:
        self.done = OutputProgress(now())
        self.write = file.write

    def keep(self, done: OutputProgress) -> None:
        """Records the progress."""
        self.done = done


def _write(
    job: OfflineJob,
    lines: Iterator[Line],
    sink: Any,
    where: str | None,
    progress: Progress,
    keep_going: bool,
    check: Callable[[], None] = lambda: None,
) -> OutputProgress:
    tokens = 0
    for block in answers(job, lines, sink.done):
        done = sink.done
        number = 0
        inputs = done.inputs
        rows = done.rows
        failed = done.failed
        first = done.first
        for line, row, error, taken in block:
            if error is not None and not keep_going:
                raise error
            if line.number != number:
                inputs += 1
                number = line.number
            rows = rows + 1
            tokens = tokens + taken
            if error is not None:
                failed += 1
                first = first or first_of(line, error)
            sink.write(encode_row(row))
            progress(rows, tokens, line.end)
        check()
        sink.keep(OutputProgress(done.began, inputs, line.number, line.end, rows, failed, first))
    last: OutputProgress = sink.done
    if last.rows == 0:
        raise NothingToDo("there are no rows to run", where=where)
    return last


def first_of(line: Line, error: AdapterpackError) -> str:
    """Describes the first row that could not be run, for the final message."""
    return f"line {line.number}: {error.what}{'' if error.found is None else f', {error.found}'}"


def encode_row(row: Mapping[str, Any]) -> bytes:
    """Encodes a line of the output. Half of a surrogate pair has no UTF-8; ``backslashreplace`` writes
    exactly JSON's escape for it.
    """
    return (json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n").encode(
        "utf-8", "backslashreplace"
    )


def require_all(done: OutputProgress, out: Path | None) -> None:
    """Checks that every row was run.

    Raises:
        RowsFailed: some rows failed; the error names the first.
    """
    if done.failed:
        raise RowsFailed(
            f"{done.failed} of {things(done.rows, 'row')} could not be run",
            where=out,
            found=done.first,
            remedy="the rows with the key error say what is wrong; all others are answered",
        )
