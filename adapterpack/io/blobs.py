"""Stores files by their sha256: copies them in while hashing, keeps them read-only, links them under other
names, counts them once.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import FormatError, storage_errors
from .atomic import own_folder, sync
from .hashing import sha256_of
from .safe_open import copy_file, open_inside

_CHUNK = 1 << 20


def place(folder: Path, digest: str) -> Path:
    """Where the blob of a sha256 (hex) lies.

    Example:
        >>> place(Path("blobs"), "abcd").as_posix()
        'blobs/ab/abcd'
    """
    return folder / digest[:2] / digest


def put(folder: Path, scratch: Path, source: Path, digest: str, size: int) -> Path:
    """The blob in ``folder`` with these bytes, hashed while they are copied from ``source`` through
    ``scratch``.

    Raises:
        FormatError: the source is not of that size (bytes) and sha256 (hex).
        StorageError: the file system refuses.
    """
    blob = place(folder, digest)
    with storage_errors(blob), tempfile.NamedTemporaryFile(dir=scratch, delete=False) as copy:
        temporary = Path(copy.name)
        try:
            sha, found = hashlib.sha256(), 0
            # a byte more than there should be: how much longer it is does not matter
            for chunk in _pieces(source, size + 1):
                sha.update(chunk)
                copy.write(chunk)
                found += len(chunk)
            if found != size or sha.hexdigest() != digest:
                raise FormatError(
                    "a file is not the one that the manifest lists: it was altered or truncated",
                    where=source,
                    expected=f"{size} bytes, sha256 {digest}",
                    remedy="fetch the pack again",
                )
            copy.flush()
            adopt(folder, temporary, digest)
        finally:
            temporary.unlink(missing_ok=True)
    return blob


def _pieces(source: Path, most: int) -> Iterator[bytes]:
    """The first ``most`` bytes of a file; its errors name the file, whatever takes the pieces."""
    with open_inside(source) as file:
        while most and (chunk := file.read(min(_CHUNK, most))):
            most -= len(chunk)
            yield chunk


def adopt(folder: Path, written: Path, digest: str) -> Path:
    """Makes a file, on the same disk and just written with these bytes, the blob of that sha256 (hex); where
    it is there already it stays.

    Raises:
        StorageError: the file system refuses.
    """
    blob = place(folder, digest)
    with storage_errors(blob):
        sync(written)
        written.chmod(0o444)
        own_folder(blob.parent)
        if not (blob.is_file() and not blob.is_symlink() and sha256_of(blob) == digest):
            # none, or an altered one: packs that are linked to that one will find out by themselves
            written.replace(blob)
            for names in (blob.parent, folder):
                sync(names)
    return blob


def link(blob: Path, target: Path) -> None:
    """Another name for a blob; where there are no hard links, or too many to it, a copy."""
    with storage_errors(target):
        try:
            target.hardlink_to(blob)
        except OSError:
            copy_file(blob, target)
            target.chmod(0o444)
            sync(target)


def files(folder: Path) -> tuple[Path, ...]:
    """Everything below a folder that is not a folder itself, links included."""
    return tuple(path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())


def inode(path: Path) -> tuple[int, int]:
    """What two names of one file have in common."""
    found = path.lstat()
    return found.st_dev, found.st_ino


def freed_bytes(gone: Iterable[Path]) -> int:
    """The bytes that the disk gets back: a file with several names counts once, and only if every one of them
    goes.
    """
    names: dict[tuple[int, int], int] = {}
    sizes: dict[tuple[int, int], tuple[int, int]] = {}
    for file in gone:
        key, found = inode(file), file.lstat()
        names[key] = names.get(key, 0) + 1
        sizes[key] = (found.st_nlink, found.st_size)
    return sum(size for key, (links, size) in sizes.items() if names[key] == links)
