"""Hashing ranges of files by several threads: bytes pass through one reused buffer a thread, so that memory stays flat for any base."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event
from typing import NamedTuple

from ..errors import StorageError, storage_errors
from .files import fill

BLOCK = 1 << 20
"""Bytes of a thread's buffer: small enough for the cache of a core, large enough that the calls do not count; a multiple of 8."""
_SETTLED = 2_000_000_000
"""Nanoseconds after which a file's times tell a later change apart, on any file system."""


class Identity(NamedTuple):
    """What tells whether a path still leads to the same unchanged file."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @property
    def settled(self) -> bool:
        """Whether the last change lies so far back that another would show in the times."""
        return time.time_ns() - max(self.modified, self.changed) > _SETTLED


class Source(NamedTuple):
    """Ranges (offset, bytes) of a file that was seen as ``identity``."""

    path: Path
    identity: Identity
    ranges: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all ranges."""
        return sum(nbytes for _, nbytes in self.ranges)


Digest = Callable[[str, Iterator[memoryview]], bytes]
"""From a name and its bytes, block by block, to what shall be kept of it."""


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def identity(path: Path) -> Identity:
    """The identity of the file that ``path`` leads to now.

    Raises:
        StorageError: there is no such file.
    """
    with storage_errors(path):
        return _identity(path.stat())


def sha256(_: str, blocks: Iterator[memoryview]) -> bytes:
    """The plain hash of the bytes."""
    hasher = hashlib.sha256()
    for block in blocks:
        hasher.update(block)
    return hasher.digest()


def digest(sources: Mapping[str, Source], each: Digest = sha256, threads: int | None = None,
           watch: Callable[[], None] | None = None) -> dict[str, bytes]:
    """``each`` of every source, by name; ``threads`` is one a core by default.

    ``watch`` is called at every block: what it raises ends the hashing. One range cannot be split over threads, so the largest go first:
    the last thread to finish is then the least late.

    Raises:
        StorageError: a file cannot be read, or is no longer the one that was opened.
    """
    todo: SimpleQueue[str] = SimpleQueue()
    for name in sorted(sources, key=lambda name: (-sources[name].nbytes, name)):
        todo.put(name)
    found: dict[str, bytes] = {}
    stop = Event()

    def work() -> None:
        buffer = memoryview(bytearray(min(BLOCK, max(source.nbytes for source in sources.values()))))
        try:
            while not stop.is_set():
                name = todo.get_nowait()
                found[name] = each(name, _blocks(sources[name], buffer, stop, watch))
        except Empty:
            return
        except BaseException:
            stop.set()  # the other threads end after their block, not after their tensor
            raise

    count = min(threads or cores(), len(sources))
    if count == 0:
        return {}
    with ThreadPoolExecutor(count) as pool:
        try:
            for future in [pool.submit(work) for _ in range(count)]:
                future.result()
        finally:
            stop.set()
    return found


def _blocks(source: Source, buffer: memoryview, stop: Event, watch: Callable[[], None] | None) -> Iterator[memoryview]:
    """The ranges in full buffers, the last of each shorter. A descriptor of its own keeps the kernel's read-ahead sequential."""
    with storage_errors(source.path):
        descriptor = os.open(source.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe put in its place must not block
        try:
            _require_same(source, descriptor)
            for start, nbytes in source.ranges:
                for offset in range(start, start + nbytes, len(buffer) or 1):
                    if stop.is_set():
                        return
                    if watch is not None:
                        watch()
                    block = buffer[: min(len(buffer), start + nbytes - offset)]
                    if not fill(descriptor, block, offset):
                        raise _changed(source.path)
                    yield block
            _require_same(source, descriptor)
        finally:
            os.close(descriptor)


def _require_same(source: Source, descriptor: int) -> None:
    """``changed`` may move without a new byte (another hard link, a new mode), so it decides on caching only."""
    if _identity(os.fstat(descriptor))[:4] != source.identity[:4]:
        raise _changed(source.path)


def _changed(path: Path) -> StorageError:
    return StorageError("the file changed while it was in use", where=path, remedy="start again once nothing writes to it")


def _identity(stat: os.stat_result) -> Identity:
    return Identity(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
