"""Locks a file between processes, shared or alone; the system frees the lock when a process dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from ..errors import Unsupported, storage_errors

CAN_LOCK = find_spec("fcntl") is not None
"""Whether this system has file locks."""


@contextmanager
def locked(path: Path, alone: bool) -> Iterator[None]:
    """Holds the lock at ``path`` during the block, waiting for it if need be; never twice in one thread, which could wait for itself.

    Whoever waits stands in the turnstile, a second lock next to the first: so many that share it one after the other, without a moment
    between them, do not keep out for ever the one who wants it alone.

    Raises:
        StorageError: the lock file cannot be made.
        Unsupported: the lock is wanted alone, and this system has no file locks.

    Example:
        >>> import tempfile
        >>> with locked(Path(tempfile.mkdtemp()) / "lock", alone=True):
        ...     pass
    """
    with _opened(path) as lock:
        with _opened(path.with_name(f"{path.name}.turn")) as turnstile, storage_errors(path):
            _take(turnstile, alone=True, needed=alone)
            _take(lock, alone, needed=alone)
        yield


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0), 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _take(descriptor: int, alone: bool, needed: bool) -> None:
    try:
        import fcntl  # noqa: PLC0415 - not on every system
    except ImportError as error:
        if needed:
            raise Unsupported("this system has no file locks, so nothing can be removed from a store safely",
                              remedy="remove the store's folder when no process uses it") from error
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)


def lock_folder(folder: Path) -> int | None:
    """The descriptor that holds the lock of a folder of this user; None where another process holds it, or the folder is gone or a link.

    Closing it frees the lock.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_DIRECTORY", 0))
    except OSError:
        return None
    try:
        import fcntl  # noqa: PLC0415 - not on every system

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status, there = os.fstat(descriptor), folder.lstat()
        if (status.st_dev, status.st_ino) == (there.st_dev, there.st_ino) and (not hasattr(os, "geteuid") or there.st_uid == os.geteuid()):
            return descriptor
    except OSError:  # locked, or removed meanwhile
        pass
    os.close(descriptor)
    return None
