"""Stores files by their sha256: hashes while copying, keeps them read-only, and links them under other
names.
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
    """Returns the path of the blob with a sha256 (hex).

    Example:
        >>> place(Path("blobs"), "abcd").as_posix()
        'blobs/ab/abcd'
    """
    return folder / digest[:2] / digest


def put(folder: Path, scratch: Path, source: Path, digest: str, size: int) -> Path:
    """Copies ``source`` into ``folder`` as a blob, hashing on the way through ``scratch``; returns its path.

    Raises:
        FormatError: the source has another size (bytes) or sha256 (hex).
        StorageError: the file system refuses.
    """
    blob = place(folder, digest)
    with storage_errors(blob), tempfile.NamedTemporaryFile(dir=scratch, delete=False) as copy:
        temporary = Path(copy.name)
        try:
            sha = hashlib.sha256()
            found = 0
            # Read one byte more than expected: enough to notice a longer file.
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
    """Yields the first ``most`` bytes of a file; errors name the file."""
    with open_inside(source) as file:
        while most and (chunk := file.read(min(_CHUNK, most))):
            most -= len(chunk)
            yield chunk


def adopt(folder: Path, written: Path, digest: str) -> Path:
    """Makes a file that was just written on the same disk the blob of its sha256 (hex); an existing intact
    blob stays.

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
    """Gives a blob another name; copies it where hard links are unavailable or used up."""
    with storage_errors(target):
        try:
            target.hardlink_to(blob)
        except OSError:
            copy_file(blob, target)
            target.chmod(0o444)
            sync(target)


def files(folder: Path) -> tuple[Path, ...]:
    """Returns everything below a folder that is not itself a folder, links included."""
    return tuple(path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())


def inode(path: Path) -> tuple[int, int]:
    """Returns what identifies a file under all of its names."""
    found = path.lstat()
    return found.st_dev, found.st_ino


def freed_bytes(gone: Iterable[Path]) -> int:
    """Returns the bytes that deleting these names would free: a file with several names counts once, and only
    if all of them are deleted.
    """
    names: dict[tuple[int, int], int] = {}
    sizes = {}
    for file in gone:
        key = inode(file)
        found = file.lstat()
        names[key] = names.get(key, 0) + 1
        sizes[key] = (found.st_nlink, found.st_size)
    return sum(size for key, (links, size) in sizes.items() if names[key] == links)
