"""Records which jobs of a merge are done, so that a merge that was killed resumes where it stopped.

A staging folder contains the output files and, in a subfolder, one journal for each machine's share. A line
names a job that is done and its sums. It is trusted if the job's bytes are certainly in the files: after a
killed process they are, unless the machine was restarted (the boot id shows that); after a restart, or on
another machine, only lines before one that says that files and journal were synced are trusted.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...errors import StorageError
from ...io import Json, open_own_file, sync, take_lock
from ..fold import LossSums
from .jobs import JobShare

FOLDER = ".merge"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
PAUSE = 0.03
"""Seconds between two syncs: the disk works in parallel to the cores from the first job on, so that there is
little to wait for at the end, and a power cut costs little.
"""
_MAX_LINE = 4096


Finished = dict[int, LossSums | None]
"""Finished jobs by number: the sums of a changed weight, or None."""


class Journal:
    """The journal of one share, locked by this process; ``files`` are the output files that the share writes.

    Raises:
        StorageError: another process is working on this share.
    """

    def __init__(self, staging: Path, share: JobShare, files: Iterable[str]) -> None:
        self.staging = staging
        self.folder = staging / FOLDER
        self.folder.mkdir(exist_ok=True)
        # at first all: an earlier process may have written to them
        self._unsynced = set(files)
        self._lock = threading.Lock()
        self._file = open_own_file(
            self.folder / f"{share.index}-of-{share.count}.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND
        )
        try:
            # without file locks two processes do the same work twice, and write the same bytes
            if not take_lock(self._file):
                raise StorageError(
                    "another process is writing this output",
                    where=staging,
                    remedy="wait for it, or give the parts of several machines with --shard",
                )
            os.write(self._file, b"\n")  # ends a line that a killed process left incomplete
            self._line({"boot": boot_id()})
        except BaseException:
            self.close()
            raise

    def add(self, number: int, sums: LossSums | None, files: Iterable[str]) -> None:
        """Notes that job ``number`` is done, which wrote to ``files``."""
        with self._lock:
            self._line({"job": number, "sums": None if sums is None else list(sums)})
            self._unsynced.update(files)

    def sync(self) -> None:
        """Waits until everything in the journal is on the disk, and records that.

        Raises:
            OSError: writing to the disk failed. The system reports that only once, so nothing of this journal
                counts as synced afterwards.
        """
        with self._lock:
            before = os.lseek(self._file, 0, os.SEEK_END)
            files = sorted(self._unsynced)
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
        """Syncs repeatedly while the block runs.

        Raises:
            OSError: at the end of the block, where a sync failed.
        """
        ended = threading.Event()
        failed = []

        def sync_repeatedly() -> None:
            try:
                while not ended.wait(PAUSE):
                    self.sync()
            except FileNotFoundError:  # another share saw that everything was done, and published it
                pass
            except OSError as error:
                failed.append(error)

        thread = threading.Thread(target=sync_repeatedly, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        if failed:
            raise failed[0]

    def close(self) -> None:
        """Releases the lock on the share."""
        os.close(self._file)

    def _line(self, value: Json) -> None:
        os.write(self._file, json.dumps(value, separators=(",", ":")).encode() + b"\n")


def boot_id() -> str:
    """Returns the id of this boot of the machine; empty where it is unknown."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def read_finished_jobs(staging: Path, count: int) -> Finished:
    """Returns the jobs, of ``count``, that are done according to trusted lines of the journals of all
    shares.
    """
    done: Finished = {}
    for path in sorted((staging / FOLDER).glob("*.jsonl")):
        with suppress(FileNotFoundError):  # published meanwhile
            done |= _trusted(path.read_bytes(), count)
    return done


def _trusted(data: bytes, count: int) -> Finished:
    current = boot_id()
    same_boot = False
    offset = 0
    trusted: Finished = {}
    waiting: list[tuple[int, int, LossSums | None]] = []
    for raw in data.splitlines(keepends=True):
        line = _parse_line(raw)
        offset += len(raw)
        if "boot" in line:
            # written before a reboot, so possibly never flushed to the disk
            waiting = [] if not same_boot else waiting
            same_boot = bool(current) and line["boot"] == current
        elif "synced" in line:
            # a sync covers only the lines that were in the file when it began
            trusted |= {number: done for end, number, done in waiting if end <= line["synced"]}
            waiting = [entry for entry in waiting if entry[0] > line["synced"]]
        elif isinstance(line.get("job"), int) and 0 <= line["job"] < count:
            sums = line.get("sums")
            waiting.append((offset, line["job"], None if sums is None else _sums(*sums)))
    return trusted | ({number: done for _, number, done in waiting} if same_boot else {})


def _sums(change: float, error: float, inner: float, moved: bool, noise: float = 0.0) -> LossSums:
    return LossSums(float(change), float(error), float(inner), bool(moved), float(noise))


def _parse_line(raw: bytes) -> Json:
    """Returns the object of a line; empty for an incomplete line and for anything but a line of a journal."""
    try:
        value = json.loads(raw[:_MAX_LINE]) if raw.endswith(b"\n") else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
