"""Outputs that are whole or absent: written under a temporary name, synced, then renamed.

An output grows in a private folder next to its place. A lock says that a process writes there, and the system
frees it when the process dies: what a killed one left is removed when an output of that name is begun again.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import FormatError, OutputExists, StorageError, storage_errors
from .locks import CAN_LOCK, lock_folder
from .safe_open import open_regular, read_at_most

_OF_WRITING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
_SHOWN = 40
"""Characters of an output's name in the name that it grows under, which must not become longer than names may
be.
"""
_TRIES = 16
"""Folders that are made before one counts as impossible to lock."""
_BEGINNING = 4096
"""Bytes of a file that is to be replaced that are looked at."""


@contextmanager
def output_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A fresh temporary folder next to ``out`` that takes its name when the block ends well, and vanishes
    when it does not.

    Raises:
        OutputExists: something is already there.
        StorageError: the disk is full, or the file system refuses.

    Example:
        >>> import tempfile
        >>> out = Path(tempfile.mkdtemp()) / "new"
        >>> with output_folder(out) as folder:
        ...     _ = (folder / "file").write_text("whole")
        >>> (out / "file").read_text()
        'whole'
    """
    target = Path(out)
    refuse_existing(target)
    with _private_folder(target) as folder:
        yield folder
        publish(folder, target)


@contextmanager
def exchanged_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A free path for a new folder, which takes the place of the folder ``out`` in one step when the block
    ends well, and vanishes when it does not. Where the system has no such step the older one is away for a
    moment.

    Raises:
        StorageError: the disk is full, or the file system refuses.
    """
    target = Path(out)
    with _private_folder(target) as folder:
        yield folder / "new"
        with storage_errors(target):
            _exchange(folder / "new", target, folder / "old")
            sync(target.parent)
    _remove(folder)


def _exchange(new: Path, target: Path, spare: Path) -> None:
    if sys.platform == "linux":
        import ctypes  # noqa: PLC0415 - numpy has imported it, other systems need not

        with suppress(AttributeError):  # a C library without it
            if (
                ctypes.CDLL(None).renameat2(_HERE, os.fsencode(new), _HERE, os.fsencode(target), _EXCHANGE)
                == 0
            ):
                return
    target.rename(spare)
    try:
        new.rename(target)
    except BaseException:  # an interrupt, too, must not take the older one along
        if not target.exists():
            spare.rename(target)
        raise


_HERE, _EXCHANGE = -100, 2
"""Linux' AT_FDCWD and RENAME_EXCHANGE."""


def publish(folder: Path, target: Path) -> None:
    """Gives a finished folder, on the same disk, its name.

    Raises:
        OutputExists: something is already there.
        StorageError: the file system refuses.
    """
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                sync(file)
        sync(folder)
        folder.chmod(0o755)
        refuse_existing(target)
        folder.rename(target)
        sync(target.parent)


@contextmanager
def output_file(out: str | os.PathLike[str], renews: bytes | None = None) -> Iterator[Path]:
    """A path that is free; what is written there replaces ``out`` when the block ends well. For files that
    may be renewed, such as reports.

    ``renews`` is a text that files of that kind have near their beginning: only one of these is replaced, and
    no link.

    Raises:
        OutputExists: something else is there.
        StorageError: the disk is full, or the file system refuses.
    """
    target = Path(out)
    if renews is not None and os.path.lexists(target) and not _has_mark(target, renews):
        raise OutputExists(
            "something else is in the place of the output, and only a file of its own kind is replaced",
            where=target,
            remedy="choose another path, or remove it first",
        )
    with _private_folder(target) as folder:
        temporary = folder / target.name
        yield temporary
        with storage_errors(target):
            sync(temporary)
            temporary.replace(target)
            folder.rmdir()


def _has_mark(path: Path, mark: bytes) -> bool:
    """Whether a path is a regular file, and no link, with these bytes near its beginning."""
    if path.is_symlink():
        return False
    with suppress(FormatError, StorageError), open_regular(path) as file:
        return mark in read_at_most(file, _BEGINNING)
    return False


@contextmanager
def _private_folder(target: Path, shown: Path | None = None, remedy: str | None = None) -> Iterator[Path]:
    """A new folder next to ``target`` that only this user may write to, under a name that nobody foresees;
    gone if the block fails.

    Errors of what is written there name ``target``, or what is ``shown`` instead, and the ``remedy``.
    """
    made = [parent for parent in target.parents if not parent.exists()]
    with storage_errors(shown or target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        folder, lock = _locked_folder(target)
    try:
        with _named_errors(folder, shown or target, remedy):
            yield folder
    except BaseException as error:  # an interrupt must clean up too
        _remove(folder)
        for parent in made:
            with suppress(OSError):  # another output may be there by now
                parent.rmdir()
        if notes := getattr(error, "__notes__", None):  # what was kept in there is gone, too
            notes[:] = [note for note in notes if str(folder) not in note]
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    """A new private folder for ``target``, and the descriptor that holds its lock, where there are locks."""
    for _ in range(_TRIES):
        # tempfile does the same, and takes 4 ms to import
        folder = target.with_name(f".{target.name[:_SHOWN]}.{os.urandom(8).hex()}.tmp")
        folder.mkdir(0o700)
        lock = lock_folder(folder) if CAN_LOCK else None
        if lock is not None or not CAN_LOCK:
            return folder, lock
        # else another process took it for abandoned before the lock was there, which does not happen often
        with suppress(OSError):
            folder.rmdir()
    raise StorageError(
        "folders that are made here cannot be locked, or belong to another user",
        where=target.parent,
        remedy="choose a place on a disk that has locks and owners",
    )


def _remove_abandoned(target: Path) -> None:
    """Removes the private folders of outputs of this name whose processes were killed."""
    if not CAN_LOCK:
        return
    name = re.compile(rf"\.{re.escape(target.name[:_SHOWN])}\.[0-9a-f]{{16}}\.tmp")
    with os.scandir(target.parent) as entries:
        folders = [Path(entry.path) for entry in entries if name.fullmatch(entry.name)]
    for folder in folders:
        if (lock := lock_folder(folder)) is not None:
            _remove(folder)
            os.close(lock)


def _remove(folder: Path) -> None:
    from shutil import rmtree  # noqa: PLC0415 - with compression in its wake, and most outputs are finished

    rmtree(folder, ignore_errors=True)


@contextmanager
def _named_errors(folder: Path, target: Path, remedy: str | None = None) -> Iterator[None]:
    """Errors of the file system name the path that they are about, and ``target`` instead of what lies in
    ``folder``, which is gone then; with a ``remedy`` of its own, if there is one.

    A block reads sources, too, so an error need not be the output's: one that names no path is so only if
    writing alone can fail like that.
    """

    def inside(where: object) -> bool:
        return isinstance(where, str) and Path(where).is_relative_to(folder)

    try:
        try:
            yield
        except OSError as error:
            where = error.filename2 or error.filename
            if error.errno in _OF_WRITING or inside(where):
                where = folder
            if where is None:
                raise
            with storage_errors(where):
                raise
    except StorageError as error:
        if not inside(error.where):
            raise
        way = remedy or "; ".join(filter(None, [error.remedy, "nothing was left behind"]))
        raise StorageError(
            error.what, where=target, expected=error.expected, found=error.found, remedy=way
        ) from error


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for temporary files, gone when the block ends. What killed processes of this user left in such
    folders is removed, too.

    Raises:
        StorageError: there is no place for temporary files, or it is full.

    Example:
        >>> with scratch_folder() as folder:
        ...     _ = (folder / "file").write_text("for a moment")
        >>> folder.exists()
        False
    """
    from tempfile import gettempdir  # noqa: PLC0415 - takes 4 ms to import

    with storage_errors("TMPDIR"):
        place = Path(gettempdir())
    with _private_folder(
        place / "adapterpack", place, "free some space there, or name another folder with TMPDIR"
    ) as folder:
        yield folder
        _remove(folder)


@contextmanager
def keep_or_remove(folder: Path, kept: Callable[[BaseException], bool]) -> Iterator[None]:
    """Where the block does not end well, the folder of its work stays for the same command to go on there, if
    it is to be ``kept``; the error says so. Else it is removed.
    """
    try:
        yield
    except BaseException as error:  # an interrupt must clean up too
        if kept(error):
            error.add_note(f"what was written so far is kept in {folder}: the same command goes on there")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def own_folder(path: Path, mode: int = 0o777) -> Path:
    """Makes a folder that this program alone fills and empties, unless it is there, and returns it.

    Raises:
        StorageError: a link is in its place: what that leads to would be emptied too, and is not ours.
    """
    with storage_errors(path):
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    if path.is_symlink():
        raise StorageError(
            "a folder that adapterpack fills and empties is a link",
            where=path,
            found=f"a link to {path.readlink()}",
            remedy="remove the link; to keep all of it elsewhere, name another place for the whole",
        )
    return path


def refuse_existing(out: Path, option: str | None = None) -> None:
    """Raises :class:`OutputExists` if ``out`` is taken; ``option`` is the setting that names another path,
    where every caller has it.
    """
    if out.exists() or out.is_symlink():
        other = "choose another path" if option is None else f"choose another path with {option}"
        raise OutputExists("the output already exists", where=out, remedy=f"{other}, or remove it first")


def sync(path: Path) -> None:
    """Makes a file's bytes, or the names in a folder, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
