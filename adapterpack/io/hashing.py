"""Computes sha256 of files and of bytes in memory, with one thread for little data and one per core for
gigabytes.

Each thread reads through one reused buffer, so memory stays flat for any size. A file's identity is compared
before and after, so that a change on the way raises an error instead of mixing two versions in one digest.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event
from typing import NamedTuple, TypeVar

from ..errors import StorageError, storage_errors
from .safe_open import fill, open_regular
from .threads import cores

BLOCK = 1 << 20
"""Bytes hashed at a time: few enough for a core's cache, enough to make the calls negligible, and a multiple
of 8.
"""
_MUCH = 64 << 20
"""Total bytes from which threads are started; one core hashes as many in 0.04 s."""
_SETTLED = 2_000_000_000
"""Nanoseconds after which another change of a file shows in its times, on any file system."""


class Identity(NamedTuple):
    """What shows whether a path still leads to the same unchanged file."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @property
    def settled(self) -> bool:
        """Whether the last change is old enough that another would show in the times."""
        return time.time_ns() - max(self.modified, self.changed) > _SETTLED


def identity(path: Path) -> Identity:
    """Returns the identity of the file that ``path`` leads to now.

    Raises:
        StorageError: there is no such file.
    """
    with storage_errors(path):
        return _identity(path.stat())


class ChangedError(StorageError):
    """A file changed while it was in use, so what was read may mix two versions."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            "the file changed while it was in use", where=path, remedy="start again once nothing writes to it"
        )


def require_unchanged(path: Path, before: Identity, exact: bool = False) -> None:
    """Raises unless a path still leads to the same unchanged file.

    ``exact`` also compares the time at which anything about the file changed, including its mode and names,
    which no user can set back.

    Raises:
        ChangedError: the file is another, or has changed.
    """
    try:
        now = identity(path)
    except StorageError as error:
        raise ChangedError(path) from error
    if now != before if exact else now[:4] != before[:4]:
        raise ChangedError(path)


class HashedSource(NamedTuple):
    """Byte ranges (offset, length) of a file that had ``identity`` when it was opened."""

    path: Path
    identity: Identity
    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def whole(cls, path: Path, known: Identity | None = None) -> HashedSource:
        """Returns a whole file, with its current identity unless an earlier one is ``known``.

        Raises:
            StorageError: there is no such file.
        """
        known = known or identity(path)
        return cls(path, known, ((0, known.size),))

    @property
    def nbytes(self) -> int:
        """The bytes of all ranges."""
        return sum(nbytes for _, nbytes in self.ranges)


def bytes_of(source: HashedSource) -> bytearray:
    """Returns the bytes of a source.

    Raises:
        ChangedError: the file has changed since it was opened, or is too short.
        StorageError: it cannot be read.
    """
    with storage_errors(source.path), open_regular(source.path) as file:
        data = bytearray(source.nbytes)
        start = 0
        _require_same(source, file.fileno())
        for offset, nbytes in source.ranges:
            if not fill(file.fileno(), memoryview(data)[start : start + nbytes], offset):
                raise ChangedError(source.path)
            start += nbytes
        _require_same(source, file.fileno())
        return data


Parts = Sequence[bytes | memoryview]
"""Bytes in memory, one part after the other."""
Key = TypeVar("Key", bound=Hashable)
Digest = Callable[[Key, Iterator[memoryview]], bytes]
"""A function from a key and its bytes, block by block, to a digest."""


def sha256(_: object, blocks: Iterator[memoryview]) -> bytes:
    """Returns the plain sha256 of the bytes."""
    hasher = hashlib.sha256()
    for block in blocks:
        hasher.update(block)
    return hasher.digest()


def digests(
    sources: Mapping[Key, HashedSource | Parts],
    each: Digest[Key] = sha256,
    watch: Callable[[], None] | None = None,
) -> dict[Key, bytes]:
    """Returns the digest of every source, by its key: the sha256, or the result of ``each`` for its bytes.

    ``watch`` is called at every block; an exception from it ends the hashing. One source cannot be split over
    threads, so the largest go first, which makes the threads finish at similar times.

    Raises:
        StorageError: a file cannot be read, or has changed since it was opened.

    Example:
        >>> digests({"a": [b"ab", b"c"]})["a"].hex()[:8]
        'ba7816bf'
    """
    sizes = {key: _nbytes(source) for key, source in sources.items()}
    todo: SimpleQueue[Key] = SimpleQueue()
    for key in sorted(sizes, key=lambda key: -sizes[key]):
        todo.put(key)
    made = {}
    stop = Event()

    def work() -> None:
        """Hashes sources until none is left, or another thread fails."""
        files = [sizes[key] for key, source in sources.items() if isinstance(source, HashedSource)]
        buffer = memoryview(bytearray(min(BLOCK, max(files, default=0))))
        try:
            while not stop.is_set():
                key = todo.get_nowait()
                made[key] = each(key, _blocks(sources[key], buffer, stop, watch))
        except Empty:
            return
        except BaseException:
            # Makes the other threads stop after their current block instead of their current source.
            stop.set()
            raise

    count = min(cores() if sum(sizes.values()) >= _MUCH else 1, len(sources))
    if count <= 1:
        work()
        return made
    with ThreadPoolExecutor(count) as pool:
        try:
            for future in [pool.submit(work) for _ in range(count)]:
                future.result()
        finally:
            stop.set()
    return made


def _nbytes(source: HashedSource | Parts) -> int:
    """Returns the bytes of a source."""
    return source.nbytes if isinstance(source, HashedSource) else sum(len(part) for part in source)


def _blocks(
    source: HashedSource | Parts, buffer: memoryview, stop: Event, watch: Callable[[], None] | None
) -> Iterator[memoryview]:
    """Yields the bytes in blocks, until ``stop`` is set."""
    for block in _ranges(source, buffer) if isinstance(source, HashedSource) else _slices(source):
        if stop.is_set():
            return
        if watch is not None:
            watch()
        yield block


def _slices(parts: Parts) -> Iterator[memoryview]:
    """Yields bytes in memory in blocks, without copying."""
    for part in parts:
        for start in range(0, len(part), BLOCK):
            yield memoryview(part)[start : start + BLOCK]


def _ranges(source: HashedSource, buffer: memoryview) -> Iterator[memoryview]:
    """Yields the ranges in full buffers, the last of each shorter. A separate descriptor per source keeps the
    kernel's read-ahead sequential.
    """
    with storage_errors(source.path):
        # a pipe put in its place must not block
        descriptor = os.open(source.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            _require_same(source, descriptor)
            for start, nbytes in source.ranges:
                for offset in range(start, start + nbytes, len(buffer) or 1):
                    block = buffer[: min(len(buffer), start + nbytes - offset)]
                    if not fill(descriptor, block, offset):
                        raise ChangedError(source.path)
                    yield block
            _require_same(source, descriptor)
        finally:
            os.close(descriptor)


def _require_same(source: HashedSource, descriptor: int) -> None:
    """Raises if the file differs from the one that was opened.

    The ``changed`` time is not compared: a new hard link or mode moves it without changing a byte.
    """
    if _identity(os.fstat(descriptor))[:4] != source.identity[:4]:
        raise ChangedError(source.path)


def _identity(stat: os.stat_result) -> Identity:
    return Identity(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def sha256_of_text(text: str) -> str:
    """Returns the sha256 of a text in UTF-8, as hex; half of a surrogate pair is taken as it is."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a file's bytes, as hex.

    Raises:
        FormatError: it is not a regular file.
        StorageError: the file system refuses.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
