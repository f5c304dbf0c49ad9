"""What of a merge is done, written down as it is done, so that one that was killed goes on where it stood.

A staging folder holds the output files under their names and, in a folder of its own, one journal a part. A line says which job is done
and what its sums were. A line may be believed if the job's bytes are certainly there: after the death of a process they are, as long as the
machine has not been restarted (the boot's id tells); after a restart, or seen from another machine, only what stands before a line which
says that files and journal were synced.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import StorageError
from ..io.atomic import sync
from .fold.loss import Sums
from .jobs import Part

FOLDER = ".merge"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
PAUSE = 0.03
"""Seconds between two syncs: the disk works beside the cores from the first job on, so that little is left to wait for at the end, and a
power cut costs no more than what was not on the disk yet."""
_MAX_LINE = 4096


class Done(NamedTuple):
    """A finished job: the sums of a changed weight, or None."""

    sums: Sums | None


class Journal:
    """The journal of one part, held by this process alone; ``files`` are the output files that the part writes.

    Raises:
        StorageError: another process is at work on this part.
    """

    def __init__(self, staging: Path, part: Part, files: Iterable[str]) -> None:
        self.staging, self.folder = staging, staging / FOLDER
        self.folder.mkdir(exist_ok=True)
        self._unsynced, self._lock = set(files), threading.Lock()  # at first all: an earlier process may have written to them
        self._file = os.open(self.folder / f"{part.index}-of-{part.count}.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            if not alone(self._file):
                raise StorageError("another process is at work on this very output", where=staging,
                                   remedy="wait for it, or give the parts of several machines with --shard")
            os.write(self._file, b"\n")  # ends a line that a death cut short
            self._line({"boot": boot()})
        except BaseException:
            self.close()
            raise

    def add(self, number: int, sums: Sums | None, files: Iterable[str]) -> None:
        """Notes that job ``number`` is done, which wrote to ``files``."""
        with self._lock:
            self._line({"job": number, "sums": None if sums is None else list(sums)})
            self._unsynced.update(files)

    def sync(self) -> None:
        """Waits until all that the journal says is on the disk, and notes that.

        Raises:
            OSError: the disk did not take it. The system says so once, so nothing of this journal may be taken for synced afterwards.
        """
        with self._lock:
            before, files = os.lseek(self._file, 0, os.SEEK_END), sorted(self._unsynced)
            self._unsynced.clear()
        if not files:
            return
        for name in files:
            sync(self.staging / name)
        with self._lock:
            self._line({"synced": before})
        os.fsync(self._file)

    @contextmanager
    def synced(self) -> Iterator[None]:
        """Syncs again and again while the block runs.

        Raises:
            OSError: at the end of the block, where a sync failed.
        """
        over, failed = threading.Event(), list[OSError]()

        def keep() -> None:
            try:
                while not over.wait(PAUSE):
                    self.sync()
            except FileNotFoundError:  # another part saw that all was done, and published it
                pass
            except OSError as error:
                failed.append(error)

        thread = threading.Thread(target=keep, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        if failed:
            raise failed[0]

    def close(self) -> None:
        """Lets another process have the part."""
        os.close(self._file)

    def _line(self, value: dict[str, Any]) -> None:
        os.write(self._file, json.dumps(value, separators=(",", ":")).encode() + b"\n")


def boot() -> str:
    """What tells one run of this machine's system from every other; empty where that is not known."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def finished(staging: Path, count: int) -> dict[int, Done]:
    """The jobs, of ``count``, that the journals of all parts say are done, and may be believed to be."""
    found: dict[int, Done] = {}
    for path in sorted((staging / FOLDER).glob("*.jsonl")):
        with suppress(FileNotFoundError):  # published meanwhile
            found |= _believed(path.read_bytes(), count)
    return found


def _believed(data: bytes, count: int) -> dict[int, Done]:
    here, same, offset = boot(), False, 0
    sure: dict[int, Done] = {}
    waiting: list[tuple[int, int, Done]] = []
    for raw in data.splitlines(keepends=True):
        line, offset = _parsed(raw), offset + len(raw)
        if "boot" in line:
            waiting = [] if not same else waiting  # of a run that ended with its machine
            same = bool(here) and line["boot"] == here
        elif "synced" in line:
            sure |= {number: done for end, number, done in waiting if end <= line["synced"]}
            waiting = [entry for entry in waiting if entry[0] > line["synced"]]
        elif isinstance(line.get("job"), int) and 0 <= line["job"] < count:
            sums = line.get("sums")
            waiting.append((offset, line["job"], Done(None if sums is None else _sums(*sums))))
    return sure | ({number: done for _, number, done in waiting} if same else {})


def _sums(change: float, error: float, inner: float, moved: bool, noise: float = 0.0) -> Sums:
    return Sums(float(change), float(error), float(inner), bool(moved), float(noise))


def _parsed(raw: bytes) -> dict[str, Any]:
    """A line's object; empty for what a death cut short, and for anything that is no line of a journal."""
    try:
        value = json.loads(raw[:_MAX_LINE]) if raw.endswith(b"\n") else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def alone(descriptor: int, wait: bool = False) -> bool:
    """Locks an open file for this process alone; False where another one has it and this one does not wait.

    Where there are no file locks it is True: two processes then do the same work twice, and write the same bytes.
    """
    try:
        import fcntl  # noqa: PLC0415 - not on every system
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
