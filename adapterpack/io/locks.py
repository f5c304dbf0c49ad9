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
def hold_lock(path: Path, alone: bool) -> Iterator[None]:
    """Holds the lock at ``path`` during the block, waiting for it if need be; never twice in one thread,
    which could wait for itself.

    Whoever waits stands in the turnstile, a second lock next to the first: so many that share it one after
    the other, without a moment between them, do not keep out for ever the one who wants it alone.

    Raises:
        StorageError: the lock file cannot be made.
        Unsupported: the lock is wanted alone, and this system has no file locks.

    Example:
        >>> import tempfile
        >>> with hold_lock(Path(tempfile.mkdtemp()) / "lock", alone=True):
        ...     pass
    """
    if alone and not CAN_LOCK:
        raise Unsupported(
            "this system has no file locks, so nothing can be removed from a store safely",
            remedy="remove the store's folder when no process uses it",
        )
    with _open(path) as lock:
        with _open(path.with_name(f"{path.name}.turn")) as turnstile, storage_errors(path):
            take_lock(turnstile, wait=True)
            take_lock(lock, shared=not alone, wait=True)
        yield


@contextmanager
def _open(path: Path) -> Iterator[int]:
    with storage_errors(path):
        descriptor = os.open(
            path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0), 0o600
        )
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def take_lock(descriptor: int, shared: bool = False, wait: bool = False) -> bool:
    """Locks an open file or folder until it is closed; False if another process has the lock, and this one
    does not ``wait``.

    Where there are no file locks (:data:`CAN_LOCK`) it is True.
    """
    if not CAN_LOCK:
        return True
    import fcntl  # noqa: PLC0415 - not on every system

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def lock_folder(folder: Path) -> int | None:
    """The descriptor that holds the lock of a folder of this user; None where another process holds it, or
    the folder is gone or a link.

    Closing it frees the lock.
    """
    try:
        descriptor = os.open(
            folder, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_DIRECTORY", 0)
        )
    except OSError:
        return None
    try:
        if take_lock(descriptor):
            status, there = os.fstat(descriptor), folder.lstat()
            if os.path.samestat(status, there) and (
                not hasattr(os, "geteuid") or there.st_uid == os.geteuid()
            ):
                return descriptor
    except OSError:  # removed meanwhile, or on a disk without locks
        pass
    os.close(descriptor)
    return None
