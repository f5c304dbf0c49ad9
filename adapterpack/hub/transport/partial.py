"""Keeps partial downloads of large files for the next try, by their SHA-256. Nothing else reads them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...errors import FormatError, storage_errors
from ...io.atomic import own_folder
from ...io.cache import cache_folder
from ...io.locks import CAN_LOCK, take_lock

LARGE = 8 << 20
"""The least size of a file whose partial download is kept."""
_KEPT_SECONDS = 7 * 86_400


@contextmanager
def partial_file(target: Path, sha256: str | None, size: int) -> Iterator[Path]:
    """Yields the path to which to write an incoming file, which may already contain its beginning. On success
    the file is moved to ``target``.

    On failure a large file with a known SHA-256 is kept, unless its bytes are wrong; any other file is
    removed.

    Raises:
        StorageError: the file system refuses.
    """
    if sha256 is not None and size >= LARGE:
        with _lock(sha256) as place:
            if place is not None:
                try:
                    yield place
                except FormatError:
                    place.unlink(missing_ok=True)
                    raise
                except KeyboardInterrupt as interrupt:
                    if place.exists():
                        here = place.stat().st_size
                        interrupt.add_note(
                            f"{here} of {size} bytes of {target.name} are kept for a week: the same "
                            "command goes on there"
                        )
                    raise
                with storage_errors(target):
                    place.replace(target)
                return
    try:
        yield target
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def remove_old(folder: Path, seconds: float) -> None:
    """Removes the entries of a folder that have not changed for so long."""
    for path in folder.iterdir():
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > seconds:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


@contextmanager
def _lock(sha256: str) -> Iterator[Path | None]:
    """Yields the path of a partial file while no other process writes to it, else None."""
    folder = own_folder(cache_folder() / "partial")
    with storage_errors(folder):
        remove_old(folder, _KEPT_SECONDS)
        descriptor = os.open(
            folder / f"{sha256}.lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600
        )
    try:
        taken = False
        with suppress(OSError):  # a file system without locks
            taken = CAN_LOCK and take_lock(descriptor)
        yield folder / sha256 if taken else None
    finally:
        os.close(descriptor)
