"""A job: what answers the lines of a file, and how its answers become an output that a later run can go on
with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..errors import AdapterpackError, NothingToDo, storage_errors
from ..io import hashing
from ..io.atomic import output_file
from ..io.strict_json import digest, finite
from ..readable import things
from ..version import VERSION
from .growing_file import OutputProgress, growing_file, now
from .lines import Line, lines_of

Progress = Callable[[int, int, int], None]
"""Called with (answers so far, tokens of these of this run, bytes of the input that are done)."""


class Answered(NamedTuple):
    """What answers a line. ``row`` is written, ``error`` says what is wrong with the line, and ``tokens`` is
    what it took.
    """

    line: Line
    row: Mapping[str, Any]
    error: AdapterpackError | None
    tokens: int


class OfflineJob(Protocol):
    """Answers lines in blocks. ``identity`` is what its answers depend on besides the lines."""

    block: int
    identity: Mapping[str, Any]

    def answer_block(self, first: int, lines: Iterable[Line], began: int) -> Iterator[Answered]:
        """The answers to a block of lines, in order. ``first`` is the number of its first line among those
        that are not empty, and the job was begun at the time ``began``, in seconds.
        """

    def close(self) -> None:
        """Ends what it has opened."""


OpenJob = Callable[[Line | None], OfflineJob]
"""From the first line of a file, if it has one, to what answers its lines."""


class RowsFailed(AdapterpackError):
    """Some rows of a file could not be run; in their places are errors."""

    code = "rows-failed"


def answers(job: OfflineJob, lines: Iterator[Line], done: OutputProgress) -> Iterator[Iterator[Answered]]:
    """The answers to all lines behind ``done``, block by block. Each block has to be taken to its end."""
    first = done.inputs + 1
    for line in lines:
        yield job.answer_block(first, chain([line], islice(lines, job.block - 1)), done.began)
        first += job.block


def begin(open_job: OpenJob, lines: Iterator[Line]) -> tuple[OfflineJob, Iterator[Line]]:
    """The job that the first line calls for, and all lines."""
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
    """Writes the answers to lines that nobody can read again: the whole file or none of it."""
    with output_file(out) as path, path.open("wb") as file:
        job, every = begin(open_job, lines)
        with closing(job):
            return _write(job, every, _Plain(file), where, progress, keep_going)


def write_file(
    open_job: OpenJob, source: Path, out: Path, progress: Progress, keep_going: bool
) -> OutputProgress:
    """Writes the answers to the lines of a file, from where an earlier run of the same job was stopped.

    Raises:
        StorageError: a file cannot be read or written, or the source changes meanwhile; or another process is
            at work on the output.
    """
    before, where = hashing.identity(source), str(source)
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
    """A file that is written from its beginning to its end."""

    def __init__(self, file: Any) -> None:
        self.done, self.write = OutputProgress(now()), file.write

    def keep(self, done: OutputProgress) -> None:
        """Notes how far it is."""
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
        done, number = sink.done, 0
        inputs, rows, failed, first = done.inputs, done.rows, done.failed, done.first
        for line, row, error, taken in block:
            if error is not None and not keep_going:
                raise error
            if line.number != number:
                inputs, number = inputs + 1, line.number
            rows, tokens = rows + 1, tokens + taken
            if error is not None:
                failed, first = failed + 1, first or first_of(line, error)
            sink.write(encode_row(row))
            progress(rows, tokens, line.end)
        check()
        sink.keep(OutputProgress(done.began, inputs, line.number, line.end, rows, failed, first))
    last: OutputProgress = sink.done
    if last.rows == 0:
        raise NothingToDo("there are no rows to run", where=where)
    return last


def first_of(line: Line, error: AdapterpackError) -> str:
    """What is said at the end of the first row that could not be run."""
    return f"line {line.number}: {error.what}{'' if error.found is None else f', {error.found}'}"


def encode_row(row: Mapping[str, Any]) -> bytes:
    """A line of an output. Half of a surrogate pair has no UTF-8; ``backslashreplace`` writes exactly JSON's
    own escape for it.
    """
    return (json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n").encode(
        "utf-8", "backslashreplace"
    )


def require_all(done: OutputProgress, out: Path | None) -> None:
    """Checks that every row was run.

    Raises:
        RowsFailed: some were not; the first of them is named.
    """
    if done.failed:
        raise RowsFailed(
            f"{done.failed} of {things(done.rows, 'row')} could not be run",
            where=out,
            found=done.first,
            remedy="the rows with the key error say what is wrong; all others are answered",
        )
