"""Opens files of packs, bases, bundles and stores safely: only regular files, no links out of their folder,
within size limits. Works without numpy.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO

from ..errors import ConfigError, FormatError, StorageError, storage_errors

TENSORS = "adapter_model.safetensors"
_TOGETHER = 512
"""Parts that one system call writes; systems allow 1024."""
LARGE = 64 << 20
"""Bytes from which a tensor file is read piece by piece."""
SMALL = 16 << 20
"""Bytes up to which a file is read instead of mapped."""
_PIECE = 1 << 20


def read_file(path: Path, limit: int) -> bytes:
    """Returns at most ``limit`` bytes of a file in its own folder.

    Raises:
        FormatError: it is not a regular file, or a link leads out of the folder.
        StorageError: the file system refuses.
    """
    with open_inside(path) as file:
        return read_at_most(file, min(limit, os.fstat(file.fileno()).st_size + 1))


def read_at_most(file: IO[bytes], limit: int) -> bytes:
    """Returns at most ``limit`` bytes of an open file; memory grows with the contents, while ``read(limit)``
    would allocate the limit at once.

    Raises:
        OSError: the file system refuses.
    """
    parts = []
    left = limit
    piece = max(os.fstat(file.fileno()).st_size, _PIECE)  # a pipe has no size
    while left and (part := file.read(min(left, piece))):
        parts.append(part)
        left -= len(part)
        piece = _PIECE
    return parts[0] if len(parts) == 1 else b"".join(parts)


def map_file(path: Path, limit: int) -> mmap:
    """Returns a memory map of at most ``limit`` bytes of a non-empty file, opened as by :func:`read_file`."""
    with open_inside(path) as file:
        return mmap(file.fileno(), min(limit, os.fstat(file.fileno()).st_size), access=ACCESS_READ)


@contextmanager
def whole(file: IO[bytes]) -> Iterator[bytes | mmap]:
    """Yields all bytes of an open file.

    A small file is read: if a mapped file is truncated by somebody, the system ends this process.

    Raises:
        OSError: the file system refuses.
    """
    size = os.fstat(file.fileno()).st_size
    if size <= SMALL:
        yield read_at_most(file, SMALL)
        return
    with mmap(file.fileno(), size, access=ACCESS_READ) as data:
        yield data


def fill(descriptor: int, block: memoryview, offset: int) -> bool:
    """Reads a file from ``offset`` until ``block`` is full; returns False if the file ends first.

    One system call may read less than requested: Linux stops at 2,147,479,552 bytes.

    Raises:
        OSError: the file cannot be read.
    """
    while block:
        count = os.preadv(descriptor, [block], offset)
        if count == 0:
            return False
        block = block[count:]
        offset += count
    return True


def write_parts(path: Path, parts: Iterable[bytes | memoryview], mode: str = "wb") -> None:
    """Writes a file from parts, several hundred per system call: after each call a thread has to wait for the
    interpreter's lock.

    Raises:
        OSError: the file system refuses.
    """
    with path.open(mode, buffering=0) as file:
        left = iter(parts)
        while together := list(itertools.islice(left, _TOGETHER)):
            written = os.writev(file.fileno(), together) if hasattr(os, "writev") else 0
            # Write what the call did not take, since it may stop early after a gigabyte or on a full disk.
            for part in together:
                rest = memoryview(part)[min(written, len(part)) :]
                written = max(0, written - len(part))
                while rest:
                    rest = rest[file.write(rest) :]


def in_hub_cache(link: Path) -> bool:
    """Whether a link is one of the Hugging Face cache: ``snapshots/COMMIT/name`` into the ``blobs`` next to
    ``snapshots``.
    """
    if not link.is_symlink():
        return False
    folder = link.parent.resolve()
    snapshots = next((parent for parent in folder.parents if parent.name == "snapshots"), None)
    return snapshots is not None and link.resolve().parent == snapshots.parent / "blobs"


def resolved_inside(path: Path, folder: Path | None = None) -> Path:
    """Returns the real path of a file of the artifact in ``folder`` (default: the file's own folder).

    The folder itself may be a link, since the user named it. Links of the hub's cache, whose snapshots link
    to its blobs, are allowed.

    Raises:
        FormatError: a link leads out of the folder.
    """
    folder = path.parent if folder is None else folder
    with storage_errors(path):
        real = path.resolve()
        if real.is_relative_to(folder.resolve()) or in_hub_cache(path):
            return real
    raise FormatError(
        "a link leads out of the folder, and what lies there is not part of it",
        where=path,
        expected="a file of its own",
        found=f"a link to {real}",
        remedy="put a copy of the file in its place, where you trust what it leads to",
    )


@contextmanager
def open_inside(path: Path, folder: Path | None = None) -> Iterator[FileIO]:
    """Opens a file of the artifact in ``folder`` (default: the file's own folder) for reading, unbuffered.

    Raises:
        FormatError: it is not a regular file, or a link leads out of the folder.
        StorageError: the file system refuses.
    """
    real = resolved_inside(path, folder)
    with _open(real, path, getattr(os, "O_NOFOLLOW", 0)) as file:
        yield file


@contextmanager
def open_regular(path: Path) -> Iterator[FileIO]:
    """Opens a file, or a link, that the user named for reading, unbuffered; does not block on a pipe or
    device.

    Raises:
        FormatError: it is not a regular file.
        StorageError: the file system refuses.
    """
    with _open(path, path, 0) as file:
        yield file


@contextmanager
def _open(real: Path, path: Path, flags: int) -> Iterator[FileIO]:
    """Opens a path without blocking on a pipe, and raises unless it is a regular file."""
    with storage_errors(path):
        descriptor = os.open(
            real, os.O_RDONLY | flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        )
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FormatError(
                    "this is not a regular file", where=path, remedy="remove it, or name another"
                )
            yield file


def copy_folder(source: Path, target: Path, folder: Path | None = None) -> None:
    """Copies ``source``, a folder of the artifact in ``folder`` (default: ``source`` itself), into
    ``target``, which may exist.

    Raises:
        FormatError: something in it is not a regular file, or a link leads out of the artifact.
        StorageError: a file changed meanwhile or is in ``target`` already, or the file system refuses.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            (target / path.relative_to(source)).mkdir(exist_ok=True)
        else:
            copy_file(path, target / path.relative_to(source), folder or source)


def copy_file(source: Path, target: Path, folder: Path | None = None) -> None:
    """Copies a file of the artifact in ``folder`` (default: the file's own folder) to a free path.

    Raises:
        FormatError: it is not a regular file, or a link leads out of the folder.
        StorageError: it changed meanwhile, ``target`` is there, or the file system refuses.
    """
    with open_inside(source, folder) as file, storage_errors(target), target.open("xb") as copy:
        before = os.fstat(file.fileno())
        while piece := file.read(_PIECE):
            copy.write(piece)
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (
            after.st_size,
            after.st_mtime_ns,
        ) or copy.tell() != before.st_size:
            raise StorageError(
                "the file changed while it was in use",
                where=source,
                remedy="start again once nothing writes to it",
            )


def require_private(path: Path) -> None:
    """Raises unless only its owner can read a file.

    Raises:
        ConfigError: others may read it.
        StorageError: the file is missing.
    """
    with storage_errors(path):
        mode = path.stat().st_mode
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            "others may read this file, which holds a secret", where=path, remedy=f"chmod 600 {path}"
        )
