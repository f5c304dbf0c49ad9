"""Locks files between processes, shared or exclusive; the operating system releases a lock when its process
dies.
"""

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
    """Holds the lock at ``path`` during the block, waiting for it if necessary; not reentrant, a thread would
    wait for itself.

    A second lock, the turnstile, is held while waiting: otherwise an endless sequence of overlapping shared
    locks could keep an exclusive one out forever. ``alone`` requests an exclusive lock.

    Raises:
        StorageError: the lock file cannot be created.
        Unsupported: the lock is to be exclusive, and this system has no file locks.

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
    """Yields the descriptor of a lock file."""
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def take_lock(descriptor: int, shared: bool = False, wait: bool = False) -> bool:
    """Locks an open file or folder until it is closed; returns False if another process has the lock and this
    one does not ``wait``.

    Returns True where there are no file locks (:data:`CAN_LOCK`).
    """
    if not CAN_LOCK:
        return True
    import fcntl  # noqa: PLC0415 - not on every system

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def is_own(status: os.stat_result) -> bool:
    """Whether a file belongs to this user; True where files have no owners."""
    return not hasattr(os, "geteuid") or status.st_uid == os.geteuid()


def lock_folder(folder: Path) -> int | None:
    """Locks a folder of this user and returns the descriptor; None if another process holds the lock, or the
    folder is gone, a link, or another user's.

    Closing the descriptor releases the lock.
    """
    try:
        descriptor = os.open(
            folder, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_DIRECTORY", 0)
        )
    except OSError:
        return None
    try:
        if take_lock(descriptor):
            status = os.fstat(descriptor)
            there = folder.lstat()
            if os.path.samestat(status, there) and is_own(there):
                return descriptor
    except OSError:
        # The folder was just removed, or its disk has no locks.
        pass
    os.close(descriptor)
    return None
