"""An output file that grows under a temporary name, in steps that survive a killed process, and gets its own
name when it is complete.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from glob import escape
from pathlib import Path

import msgspec

from ..errors import storage_errors
from ..io import CAN_LOCK, FrozenStruct, hold_folder, keep_or_remove, open_own_file, refuse_existing, sync
from ..io.locks import lock_folder
from ..readable import size

_ROWS, _STEPS = "rows", "steps"
_SHOWN = 40
"""The most characters of an output's name in the name of its temporary folder."""
_LOG = logging.getLogger(__name__)


class OutputProgress(FrozenStruct):
    """The progress of a job that ``began`` at a time, in seconds.

    ``inputs`` is the number of rows read, up to the ``line`` and the byte ``end`` of the input; ``rows`` is
    the number of answers, of which ``failed`` are errors; ``first`` describes the first error; ``size`` is
    the size of the output in bytes.
    """

    began: int
    inputs: int = 0
    line: int = 0
    end: int = 0
    rows: int = 0
    failed: int = 0
    first: str = ""
    size: int = 0


class GrowingFile:
    """The file while it grows. ``done`` is the last step that was kept."""

    def __init__(self, folder: Path, out: Path) -> None:
        self._out = out
        self._rows = open_own_file(folder / _ROWS, os.O_RDWR | os.O_CREAT, 0o666)
        self._steps = open_own_file(folder / _STEPS, os.O_RDWR | os.O_CREAT)
        self.done = _last_step(folder / _STEPS, os.fstat(self._rows).st_size)
        os.ftruncate(self._rows, self.done.size)  # bytes after the last step are discarded
        os.lseek(self._rows, 0, os.SEEK_END)
        os.lseek(self._steps, 0, os.SEEK_END)
        _write(self._steps, b"\n")  # terminates a line that a killed process left incomplete

    def write(self, data: bytes) -> None:
        """Appends to the file.

        Raises:
            StorageError: the disk is full, or the file system refuses.
        """
        with storage_errors(self._out):
            _write(self._rows, data)

    def keep(self, done: OutputProgress) -> None:
        """Makes everything written so far durable, as one step.

        Raises:
            StorageError: the disk is full, or the file system refuses.
        """
        done = msgspec.structs.replace(done, size=os.lseek(self._rows, 0, os.SEEK_CUR))
        with storage_errors(self._out):
            os.fsync(self._rows)
            _write(self._steps, msgspec.json.encode(done) + b"\n")
            os.fsync(self._steps)
        self.done = done

    def close(self) -> None:
        """Closes the files."""
        os.close(self._rows)
        os.close(self._steps)


@contextmanager
def growing_file(out: Path, key: str) -> Iterator[GrowingFile]:
    """Yields a file that becomes ``out`` when the block succeeds. Otherwise its steps are kept for the next
    call with the same ``out`` and ``key``; ``key`` covers everything on which the bytes depend.

    Raises:
        OutputExists: ``out`` exists.
        StorageError: the file system refuses, or another process is writing the same output.
    """
    refuse_existing(out)
    folder = out.with_name(f".{out.name[:_SHOWN]}.{key[:16]}.partial")
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _mention_others(out, folder)
        lock = hold_folder(folder)
    try:
        with keep_or_remove(folder, lambda error: _read_progress(folder).rows > 0):
            with storage_errors(out):
                file = GrowingFile(folder, out)
            with closing(file):
                yield file
            refuse_existing(out)
            with storage_errors(out):
                (folder / _ROWS).rename(out)
                sync(out.parent)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read_progress(folder: Path) -> OutputProgress:
    """Returns the last step in a folder."""
    with suppress(OSError):
        return _last_step(folder / _STEPS, (folder / _ROWS).stat().st_size)
    return OutputProgress(now())


def now() -> int:
    """Returns the time in seconds, or ``SOURCE_DATE_EPOCH`` if it is set
    (https://reproducible-builds.org/specs/source-date-epoch/).
    """
    return int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())


def _last_step(path: Path, size_of_rows: int) -> OutputProgress:
    """Returns the last complete step whose bytes are all in the file."""
    done = OutputProgress(now())
    for raw in path.read_bytes().splitlines():
        with suppress(msgspec.DecodeError, msgspec.ValidationError):
            step = msgspec.json.decode(raw, type=OutputProgress)
            done = step if step.size <= size_of_rows else done
    return done


def _mention_others(out: Path, folder: Path) -> None:
    """Logs which unfinished work on this output remains from runs with other inputs or options, since this
    run cannot resume it.
    """
    if not CAN_LOCK:
        return
    for other in sorted(out.parent.glob(f".{escape(out.name[:_SHOWN])}.{'[0-9a-f]' * 16}.partial")):
        if other != folder and (lock := lock_folder(other)) is not None:
            os.close(lock)
            nbytes = sum(path.stat().st_size for path in other.iterdir())
            _LOG.warning(
                "%s holds %s of another run, of another input or with other options; that command goes "
                "on with it, or delete it",
                other,
                size(nbytes),
            )
