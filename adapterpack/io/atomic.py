"""Outputs that are whole or absent: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputExists, storage_errors


@contextmanager
def output_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A fresh temporary folder beside ``out`` that takes its name when the block ends well, and vanishes when it does not.

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
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = target.with_name(f".{target.name}.{os.urandom(4).hex()}.partial")  # as tempfile has it, whose import takes 4 ms
        folder.mkdir(0o700)
        try:
            yield folder
            publish(folder, target)
        except BaseException:  # an interrupt must clean up too
            from shutil import rmtree  # noqa: PLC0415 - with compression in its wake, and most outputs are finished

            rmtree(folder, ignore_errors=True)
            raise


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
def output_file(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``out`` that replaces it when the block ends well; used for files that may be renewed, such as reports."""
    target = Path(out)
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            yield temporary
            sync(temporary)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def refuse_existing(out: Path) -> None:
    """Raises :class:`OutputExists` if ``out`` is taken."""
    if out.exists() or out.is_symlink():
        raise OutputExists("the output already exists", where=out, remedy="choose another path with -o, or remove it first")


def sync(path: Path) -> None:
    """Makes a file's bytes, or the names in a folder, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
