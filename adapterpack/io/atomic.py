"""Writes outputs that are either complete or absent: under a temporary name, synced, then renamed.

An output grows in a private folder next to its final place. A lock marks it as in use, and the operating
system releases the lock when the process dies, so the folder of a killed process is removed when the next
output of that name begins.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir

from ..errors import FormatError, OutputExists, StorageError, storage_errors
from ..paths import StrPath
from .locks import CAN_LOCK, lock_folder
from .safe_open import open_regular, read_at_most

_OF_WRITING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
_SHOWN = 40
"""Characters of an output's name in its temporary name, which must not exceed the file system's limit."""
_TRIES = 16
"""Attempts to create and lock a folder before giving up."""
_BEGINNING = 4096
"""Bytes at the start of a file to be replaced that are searched for its mark."""


_PACK = "adapterpack.json"
"""What a folder holds that may be replaced: a pack's manifest."""


@contextmanager
def output_folder(out: StrPath, replace: bool = False) -> Iterator[Path]:
    """Yields a fresh temporary folder next to ``out``, which takes that name when the block succeeds, and is
    removed when it fails. With ``replace`` it takes the place of a pack that is there, atomically where the
    system can.

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
    refuse_existing(target, replace=replace)
    with _private_folder(target) as folder:
        yield folder
        publish(folder, target, replace)


@contextmanager
def exchanged_folder(out: StrPath) -> Iterator[Path]:
    """Yields a free path for a new folder, which replaces the folder ``out`` atomically when the block
    succeeds, and is removed when it fails.

    Where the system has no atomic exchange, the older folder is absent for a moment.

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
    """Exchanges two folders, atomically where the system can."""
    if sys.platform == "linux":
        # The C library may lack the function.
        with suppress(AttributeError):
            if (
                ctypes.CDLL(None).renameat2(_HERE, os.fsencode(new), _HERE, os.fsencode(target), _EXCHANGE)
                == 0
            ):
                return
    target.rename(spare)
    try:
        new.rename(target)
    except BaseException:
        # Restore the older folder, after an interrupt as well.
        if not target.exists():
            spare.rename(target)
        raise


_HERE = -100
_EXCHANGE = 2
"""Linux' AT_FDCWD and RENAME_EXCHANGE."""


def publish(folder: Path, target: Path, replace: bool = False) -> None:
    """Gives a finished folder on the same disk its final name; with ``replace`` in place of a pack.

    Raises:
        OutputExists: something is already there.
        StorageError: the file system refuses.
    """
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                sync(file)
        # Files first, then the folder, then the rename: after a power cut the final name never leads to
        # partial contents.
        sync(folder)
        folder.chmod(0o755)
        refuse_existing(target, replace=replace)
        if target.exists():
            _exchange(folder, target, spare := folder.with_name(f"{folder.name}.old"))
            _remove(folder)
            _remove(spare)
        else:
            folder.rename(target)
        sync(target.parent)


@contextmanager
def output_file(out: StrPath, renews: bytes | None = None) -> Iterator[Path]:
    """Yields a free path; the file written there replaces ``out`` when the block succeeds. For files that may
    be renewed, such as reports.

    ``renews`` is text that files of that kind contain near their start: only such a file is replaced, and
    never a link.

    Raises:
        OutputExists: another kind of file is there.
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
    """Whether a path is a regular file, not a link, with these bytes near its start."""
    if path.is_symlink():
        return False
    with suppress(FormatError, StorageError), open_regular(path) as file:
        return mark in read_at_most(file, _BEGINNING)
    return False


@contextmanager
def _private_folder(target: Path, shown: Path | None = None, remedy: str | None = None) -> Iterator[Path]:
    """Yields a new folder next to ``target`` with an unpredictable name, writable by this user only; removes
    it if the block fails.

    Errors about files in it name ``target``, or ``shown`` instead, with the ``remedy``.
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
            # Another process may have written an output there.
            with suppress(OSError):
                parent.rmdir()
        # Drop notes about files in the folder: it no longer exists.
        if notes := getattr(error, "__notes__", None):
            notes[:] = [note for note in notes if str(folder) not in note]
        raise
    finally:
        _begun.pop(folder.absolute(), None)
        if lock is not None:
            os.close(lock)


_begun: dict[Path, int] = {}
"""Private folders, known before they exist, and the processes that make them."""


@atexit.register
def _remove_begun() -> None:
    """Removes the folders that an interrupt left before the code that cleans them up began."""
    for folder, process in _begun.items():
        if process == os.getpid():
            _remove(folder)


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    """Creates a private folder for ``target``; returns it with the descriptor that holds its lock (None on
    systems without locks).
    """
    for _ in range(_TRIES):
        # Not tempfile.mkdtemp, whose names _remove_abandoned would not recognise.
        folder = target.with_name(f".{target.name[:_SHOWN]}.{os.urandom(8).hex()}.tmp")
        _begun[folder.absolute()] = os.getpid()
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
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _named_errors(folder: Path, target: Path, remedy: str | None = None) -> Iterator[None]:
    """Makes file system errors name the path that they are about, and ``target`` instead of a path in
    ``folder``, which no longer exists then.

    The block also reads sources, so an error need not be the output's: one without a path counts as the
    output's only if nothing but writing can fail like that.
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
    """Yields a folder for temporary files, removed when the block ends. Also removes what killed processes of
    this user left.

    Raises:
        StorageError: there is no place for temporary files, or it is full.

    Example:
        >>> with scratch_folder() as folder:
        ...     _ = (folder / "file").write_text("for a moment")
        >>> folder.exists()
        False
    """
    with storage_errors("TMPDIR"):
        place = Path(gettempdir())
    with _private_folder(
        place / "adapterpack", place, "free some space there, or name another folder with TMPDIR"
    ) as folder:
        yield folder
        _remove(folder)


@contextmanager
def keep_or_remove(folder: Path, kept: Callable[[BaseException], bool]) -> Iterator[None]:
    """If the block fails, keeps the working folder for the same command to resume from, if ``kept`` says so,
    and notes that in the error; else removes the folder.
    """
    try:
        yield
    except BaseException as error:  # an interrupt must clean up too
        if kept(error):
            error.add_note(f"what was written so far is kept in {folder}: the same command goes on there")
        else:
            _remove(folder)
        raise


def own_folder(path: Path, mode: int = 0o777) -> Path:
    """Creates a folder that only this program fills and empties, if necessary, and returns it.

    Raises:
        StorageError: it is a link; emptying it would delete files of others.
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


def refuse_existing(out: StrPath | None, option: str | None = None, replace: bool = False) -> None:
    """Raises :class:`OutputExists` if ``out`` is a path that exists, with ``replace`` if it is no pack;
    ``option`` is the setting with which every caller can name another path.
    """
    if out is None or not os.path.lexists(out):
        return
    if replace and not Path(out).is_symlink() and (Path(out) / _PACK).is_file():
        return
    other = "choose another path" if option is None else f"choose another path with {option}"
    raise OutputExists(
        "the output is something else than a pack, and stays" if replace else "the output already exists",
        where=out,
        remedy=f"{other}, or remove it first",
    )


def sync(path: Path) -> None:
    """Flushes a file's bytes, or a folder's names, to disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
