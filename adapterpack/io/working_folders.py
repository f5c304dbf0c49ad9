"""Protects working folders with predictable names, in which one run continues another's work: they belong to
this user, contain no links, and are used by one process at a time. Finds the folder of caches, too.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..errors import StorageError, storage_errors
from .locks import CAN_LOCK, is_own, lock_folder

_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def claim_folder(path: Path) -> None:
    """Creates a working folder if necessary, and removes other users' permission to write there.

    Raises:
        StorageError: the folder, or something in it, is a link or belongs to another user.
    """
    _claim(path)
    _require_own_contents(path)


def hold_folder(path: Path) -> int | None:
    """Claims a folder as :func:`claim_folder` does, and locks it; returns the descriptor that holds the lock,
    None where there are no locks.

    Raises:
        StorageError: as for :func:`claim_folder`, or another process uses the folder.
    """
    _claim(path)
    lock = lock_folder(path) if CAN_LOCK else None
    if lock is None and CAN_LOCK:
        raise StorageError(
            "another process is writing this output",
            where=path,
            remedy="wait for it, or choose another output",
        )
    try:
        # Check only under the lock: another process's files would appear and vanish.
        _require_own_contents(path)
    except BaseException:
        if lock is not None:
            os.close(lock)
        raise
    return lock


def open_own_file(path: Path, flags: int, mode: int = 0o600) -> int:
    """Opens a file of a working folder, with ``flags`` of ``os.open``.

    Raises:
        StorageError: it is a link, not a regular file, another user's, or has further names, under which it
            would change, too.
        OSError: the file system refuses.
    """
    # Checked here because systems report it with different errors.
    if path.is_symlink():
        raise _not_own(path, f"a link to {path.readlink()}")
    descriptor = os.open(path, flags | _NO_LINK | getattr(os, "O_NONBLOCK", 0), mode)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _not_own(path, "no regular file")
        if status.st_nlink > 1:
            raise _not_own(path, "a file with another name")
        if not is_own(status):
            raise _not_own(path, "a file of another user")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _claim(path: Path) -> None:
    """Creates and protects the folder itself."""
    with storage_errors(path):
        if path.is_symlink():
            raise _not_own(path, f"a link to {path.readlink()}")
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
        if not (stat.S_ISDIR(status.st_mode) and is_own(status)):
            raise _not_own(path, "a folder of another user" if stat.S_ISDIR(status.st_mode) else "no folder")
        if status.st_mode & _OTHERS:
            path.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS)


def _require_own_contents(folder: Path) -> None:
    """Raises if the folder contains links or another user's files."""
    with storage_errors(folder):
        for entry in _entries(folder):
            # Another machine may share the work, and its files appear and vanish.
            with suppress(FileNotFoundError):
                if entry.is_symlink():
                    raise _not_own(Path(entry.path), f"a link to {Path(entry.path).readlink()}")
                if not is_own(entry.stat(follow_symlinks=False)):
                    raise _not_own(Path(entry.path), "a file of another user")


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yields everything below a folder, without following links."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            yield entry
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(Path(entry.path))


def _not_own(path: Path, found: str) -> StorageError:
    """Returns the error for a path that is not this user's own."""
    return StorageError(
        "a run works in folders and files of its own user alone, and follows no link there",
        where=path,
        found=found,
        remedy="remove it, or choose another output",
    )


def cache_folder() -> Path:
    """Returns the folder for fetched models and stored packs: ``ADAPTERPACK_CACHE``, or one in the user's
    cache folder.

    Example:
        >>> cache_folder().name != ""
        True
    """
    named = os.environ.get("ADAPTERPACK_CACHE")
    if named:
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "adapterpack"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adapterpack"
