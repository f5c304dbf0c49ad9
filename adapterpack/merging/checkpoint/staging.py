"""Writes an output in a staging folder next to its final path; the folder survives a killed process and is
renamed when complete.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import StorageError, storage_errors
from ...io import ChangedError, claim_folder, keep_or_remove, open_own_file, refuse_existing, sync, take_lock
from ...readable import size
from .journal import FOLDER, Journal

_LOG = logging.getLogger(__name__)


def folder_for(out: Path, key: str) -> Path:
    """Returns the staging folder for ``out``: the same for the same work (``key``), so that a later run finds
    it.
    """
    return out.parent / f".{out.name}.{key[:16]}.partial"


def bytes_on_disk(folder: Path) -> int:
    """Returns the bytes that a staging folder takes on the disk."""
    return (
        sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
        if folder.is_dir()
        else 0
    )


def list_abandoned_folders(out: Path, folder: Path) -> list[Path]:
    """Returns staging folders of other outputs next to ``out`` that no process uses: of work that was killed,
    or kept in order to resume it.
    """
    unused = []
    for other in sorted(out.parent.glob(".*.partial")) if out.parent.is_dir() else []:
        journals = (
            sorted((other / FOLDER).glob("*.jsonl")) if other != folder and not other.is_symlink() else []
        )
        if journals and not any(_in_use(journal) for journal in journals):
            unused.append(other)
    return unused


def _in_use(journal: Path) -> bool:
    try:
        descriptor = os.open(journal, os.O_RDWR)
    except OSError:  # removed meanwhile, or another user's
        return True
    try:
        return not take_lock(descriptor)
    finally:
        os.close(descriptor)


def require_space(out: Path, needed: int) -> None:
    """Checks that the disk of ``out`` has room for ``needed`` bytes.

    Raises:
        StorageError: the disk has less free space.
    """
    with storage_errors(out):
        parent = next(folder for folder in out.resolve().parents if folder.exists())
        free = shutil.disk_usage(parent).free
    if free < needed:
        raise StorageError(
            "there is not enough space on the disk",
            where=parent,
            expected=f"{needed:,} bytes",
            found=f"{free:,} bytes free",
            remedy="free some space or choose another output folder",
        )


@contextmanager
def open_staging(
    out: Path, folder: Path, open_journal: Callable[[Path], Journal], keep: bool
) -> Iterator[Journal]:
    """Opens a staging folder, new or left by an earlier run, and yields its journal, locked by this process.

    The folder remains if the process is killed; on an error it is deleted, unless ``keep`` is set so that a
    later run can resume.

    Raises:
        OutputExists: something is at ``out``.
        StorageError: the file system refuses, another process has locked the journal, or the folder belongs
            to someone else.
    """
    refuse_existing(out)
    with storage_errors(out):
        for other in list_abandoned_folders(out, folder):
            _LOG.warning(
                "%s holds %s of work that did not end; the same command goes on with it, or delete it",
                other,
                size(bytes_on_disk(other)),
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        claim_folder(folder)
        try:
            journal = open_journal(folder)
        except OSError:  # a full disk; while another process works here, it is a StorageError
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        try:  # never resumes work that was computed from another base
            with keep_or_remove(folder, lambda error: keep and not isinstance(error, ChangedError)):
                yield journal
        finally:
            journal.close()


def publish(
    folder: Path, out: Path, finish: Callable[[Path], None], durable: bool, file: str | None = None
) -> bool:
    """Renames a complete staging folder, or the one ``file`` in it, to ``out``, after ``finish`` wrote the
    last files; False where another process did it first.

    ``durable`` waits until every byte is on the disk, so that the output survives a power cut from the moment
    it has its name.
    """
    try:
        lock = open_own_file(folder / FOLDER / "join", os.O_RDWR | os.O_CREAT)
    except FileNotFoundError:
        return False
    try:
        take_lock(lock, wait=True)
        if not (folder / FOLDER).is_dir():
            return False
        finish(folder)
        if durable:
            for path in sorted(folder.rglob("*")):
                sync(path)
        refuse_existing(out)
        # first: journals that outlive their files would be trusted by a later run
        shutil.rmtree(folder / FOLDER)
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
    finally:
        os.close(lock)
    return True
