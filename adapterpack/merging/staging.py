"""The folder in which an output grows beside its place, that outlives a kill and takes the output's name when it is whole."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import StorageError, storage_errors
from ..io.atomic import refuse_existing, sync
from ..io.readable import size
from .journal import FOLDER, Journal, alone

_LOG = logging.getLogger(__name__)


def place(out: Path, key: str) -> Path:
    """The staging folder of work on ``out``: the same for the same work, so that it is found again."""
    return out.parent / f".{out.name}.{key[:16]}.partial"


def taken(folder: Path) -> int:
    """The bytes that a staging folder holds on the disk already."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def left_behind(out: Path, folder: Path) -> list[Path]:
    """Staging folders of other outputs beside ``out`` that no process is at work in: of work that was killed, or kept to be resumed."""
    found = []
    for other in sorted(out.parent.glob(".*.partial")) if out.parent.is_dir() else []:
        journals = sorted((other / FOLDER).glob("*.jsonl")) if other != folder and not other.is_symlink() else []
        if journals and not any(_held(journal) for journal in journals):
            found.append(other)
    return found


def _held(journal: Path) -> bool:
    try:
        descriptor = os.open(journal, os.O_RDWR)
    except OSError:  # gone meanwhile, or of another user: not ours to speak of
        return True
    try:
        return not alone(descriptor)
    finally:
        os.close(descriptor)


def require_space(out: Path, needed: int) -> None:
    """Checks that ``needed`` bytes more fit beside ``out``.

    Raises:
        StorageError: they do not.
    """
    with storage_errors(out):
        parent = next(folder for folder in out.resolve().parents if folder.exists())
        free = shutil.disk_usage(parent).free
    if free < needed:
        raise StorageError("there is not enough space on the disk", where=parent, expected=f"{needed:,} bytes",
                           found=f"{free:,} bytes free", remedy="free some space or choose another output folder")


@contextmanager
def staged(out: Path, folder: Path, open_journal: Callable[[Path], Journal], keep: bool) -> Iterator[Journal]:
    """A staging folder, new or found again, with the journal that this process holds in it alone.

    It stays behind where the process dies; on an error it vanishes, unless ``keep`` says that the work shall be gone on with.

    Raises:
        OutputExists: something is at ``out``.
        StorageError: the file system refuses, another process holds the journal, or the folder belongs to someone else.
    """
    refuse_existing(out)
    with storage_errors(out):
        for other in left_behind(out, folder):
            _LOG.warning("%s holds %s of work that did not end; the same command goes on with it, or delete it", other, size(taken(other)))
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        _require_own(folder)
        if (ready := _ready(folder)).is_dir() and not (folder / FOLDER).exists():  # died just before it got its name
            ready.rename(folder / FOLDER)
        journal = open_journal(folder)
        try:
            yield journal
        except BaseException as error:  # an interrupt must clean up too
            if keep:
                error.add_note(f"what was written so far is kept in {folder}: the same command goes on there")
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            journal.close()


def publish(folder: Path, out: Path, finish: Callable[[Path], None], durable: bool, file: str | None = None) -> bool:
    """Gives a whole staging folder, or the one ``file`` in it, its name, after ``finish`` put in what is written last; False where another
    process did it first.

    ``durable`` waits until every byte is on the disk, so that the output survives a power cut from the moment it has its name.
    """
    try:
        lock = os.open(folder / FOLDER / "join", os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        return False
    try:
        alone(lock, wait=True)
        if not (folder / FOLDER).is_dir():
            return False
        finish(folder)
        if durable:
            for path in sorted(folder.rglob("*")):
                sync(path)
        refuse_existing(out)
        journals = _ready(folder)
        (folder / FOLDER).rename(journals)
        if durable:
            sync(folder)
        if file is None:
            folder.chmod(0o755)
            folder.rename(out)
        else:
            (folder / file).rename(out)
            folder.rmdir()
        if durable:
            sync(out.parent)
        shutil.rmtree(journals, ignore_errors=True)
    finally:
        os.close(lock)
    return True


def _ready(folder: Path) -> Path:
    """Where the journals of a staging folder lie while it gets its name."""
    return folder.with_name(f"{folder.name}.journals")


def _require_own(folder: Path) -> None:
    """The name can be foreseen, so someone else may have put something there."""
    found = folder.lstat()
    if folder.is_symlink() or (hasattr(os, "geteuid") and found.st_uid != os.geteuid()):
        raise StorageError("the folder in which the output would grow belongs to someone else", where=folder,
                           remedy="choose an output in a folder of your own")
