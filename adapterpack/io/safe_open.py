"""Opens the files of a pack safely, without numpy: regular files only, read once, within limits; and writes them."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO

from ..errors import FormatError, storage_errors

TENSORS = "adapter_model.safetensors"
_TOGETHER = 512
"""Parts that one call takes; systems allow 1024."""
LARGE = 64 << 20
"""Bytes of a tensor file above which it is read piece by piece."""
_PIECE = 1 << 20


def read_file(path: Path, limit: int) -> bytes:
    """At most ``limit`` bytes of a regular file; a link that was put in its place meanwhile is not followed.

    Raises:
        FormatError: it is no regular file.
        StorageError: the file system refuses.
    """
    with _opened(path) as file:
        return read_at_most(file, min(limit, os.fstat(file.fileno()).st_size + 1))


def read_at_most(file: IO[bytes], limit: int) -> bytes:
    """At most ``limit`` bytes of an open file, in memory in proportion to what it holds: ``read(limit)`` takes the limit at once.

    Raises:
        OSError: the file system refuses.
    """
    parts, left = [], limit
    piece = max(os.fstat(file.fileno()).st_size, _PIECE)  # a pipe has no size
    while left and (part := file.read(min(left, piece))):
        parts.append(part)
        left, piece = left - len(part), _PIECE
    return parts[0] if len(parts) == 1 else b"".join(parts)


def mapped(path: Path, limit: int) -> mmap:
    """As :func:`read_file`, of a file that is not empty, without holding it."""
    with _opened(path) as file:
        return mmap(file.fileno(), min(limit, os.fstat(file.fileno()).st_size), access=ACCESS_READ)


def fill(descriptor: int, block: memoryview, offset: int) -> bool:
    """Reads a file from ``offset`` on until ``block`` is full; False if the file ends first.

    One call of the system may read less than it was given room for: Linux stops at 2,147,479,552 bytes.

    Raises:
        OSError: the file cannot be read.
    """
    while block:
        count = os.preadv(descriptor, [block], offset)
        if count == 0:
            return False
        block, offset = block[count:], offset + count
    return True


def write_parts(path: Path, parts: Iterable[bytes | memoryview], mode: str = "wb") -> None:
    """Writes a file of these parts, some hundreds in one call of the system: after each a thread waits for the interpreter's lock.

    Raises:
        OSError: the file system refuses.
    """
    with path.open(mode, buffering=0) as file:
        left = iter(parts)
        while together := list(itertools.islice(left, _TOGETHER)):
            written = os.writev(file.fileno(), together) if hasattr(os, "writev") else 0
            for part in together:  # what one call does not take, of a gigabyte or on a full disk
                rest = memoryview(part)[min(written, len(part)) :]
                written = max(0, written - len(part))
                while rest:
                    rest = rest[file.write(rest) :]


def in_hub_cache(link: Path) -> bool:
    """Whether a link is one that the hub's client makes: ``snapshots/COMMIT/name`` into the ``blobs`` next to ``snapshots``."""
    if not link.is_symlink():
        return False
    folder = link.parent.resolve()
    return folder.parent.name == "snapshots" and link.resolve().parent == folder.parent.parent / "blobs"


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with storage_errors(path):
        real = path.resolve() if in_hub_cache(path) else path
        descriptor = os.open(real, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FormatError("this is not a regular file", where=path)
            yield file
