"""A local, content-addressed store of packs: every file is stored once under its sha256, and hashed again
when it is read.

    blobs/ab/abcd...   read-only files by sha256
    packs/ID/          one folder per pack, with links to the blobs
    tmp/               files being written
    quarantine/        files found altered

Everything appears by a rename and is never written to again, so readers see complete packs or none. Adding
and reading share a lock; garbage collection and quarantine hold it exclusively. The stored packs are ordinary
folders that PEFT can load in place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .errors import (
    AdapterpackError,
    CorruptBlob,
    FormatError,
    StorageError,
    UnknownName,
    nearest,
    storage_errors,
)
from .io import (
    blobs,
    cache_folder,
    hold_lock,
    open_inside,
    own_folder,
    read_at_most,
    read_file,
    sha256_of,
    sync,
)
from .manifest import manifest as m
from .pack import Pack, load
from .pack.validate.checks import regular_files
from .paths import StrPath

_ID = re.compile(r"(?:sha256:)?([0-9a-f]{64})")


@dataclass(frozen=True)
class StoredPack:
    """One pack of a store: its id, its name, and the total size of its files in bytes."""

    id: str
    name: str
    bytes: int


@dataclass(frozen=True)
class Garbage:
    """What :meth:`Store.gc` removed, or would remove: ids of packs, the number of other files, and the bytes
    that this frees.
    """

    packs: tuple[str, ...]
    files: int
    bytes: int
    dry_run: bool


class Store:
    """The store in ``root``, by default in the user's cache folder; any number of processes may use it at
    once.

    Example:
        >>> store = Store(tempfile.mkdtemp())
        >>> store.list(), store.gc().bytes
        ((), 0)
    """

    def __init__(self, root: StrPath | None = None) -> None:
        self.root = cache_folder() / "store" if root is None else Path(root)

    def add(self, pack: Pack | StrPath) -> Pack:
        """Copies a pack into the store, hashes it on the way, and returns it as loaded from the store.

        Files outside the manifest's list, such as a README or a signature, are not copied. A pack that the
        store already has is not written again.

        Raises:
            FormatError: the pack is invalid; nothing of it is kept.
            StorageError: the file system refuses.
        """
        target, added = self._add(pack)
        # the existing entry was altered: moving it into quarantine frees its place
        if added is None:
            self._quarantine(target)
            target, added = self._add(pack)
        if added is None:
            raise CorruptBlob(
                "a pack that was just stored is altered again", where=target, remedy="check the disk"
            )
        return added

    def _add(self, pack: Pack | StrPath) -> tuple[Path, Pack | None]:
        """Returns the pack's place and the pack stored there; None instead of the pack if the place holds
        something else. It holds one lock throughout, so that nothing is collected in between.
        """
        with self._lock(alone=False), self._scratch() as scratch:
            source = self._source(pack, scratch / "written")
            staged, identity = self._staged(source, scratch / "staged")
            if isinstance(pack, Pack) and pack.id != identity:
                raise FormatError(
                    "the folder of the pack holds another pack now",
                    where=source,
                    expected=pack.id,
                    found=identity,
                )
            checked = load(staged)  # an invalid pack is never published
            target = self._pack_folder(checked.id)
            with storage_errors(target):
                staged.chmod(0o755)
                try:
                    staged.rename(target)
                except OSError:
                    if not target.is_dir():  # it was there before, or another process was faster
                        raise
                    with suppress(AdapterpackError):
                        return target, _verify(target)
                    return target, None
                for names in (target.parent, self.root, self.root.parent):
                    sync(names)
            return target, dataclasses.replace(checked, path=target)

    def get(self, identity: str) -> Pack:
        """Returns the pack with this id, after hashing every byte again.

        Raises:
            CorruptBlob: stored bytes were altered; they are moved into ``quarantine``, and the pack can be
                added again.
            UnknownName: the store has no such pack.
        """
        folder = self._pack_folder(identity)
        try:
            return self._get(folder)
        except UnknownName:
            raise
        except AdapterpackError:
            altered = self._quarantine(folder)
        # another process may have repaired or removed it meanwhile; any other problem is raised here
        if not altered:
            return self._get(folder)
        raise CorruptBlob(
            "a stored pack was altered and is in quarantine now",
            where=folder,
            found=", ".join(altered),
            remedy="add the pack again from where it came",
        )

    def _get(self, folder: Path) -> Pack:
        with self._lock(alone=False):
            if not folder.is_dir():
                raise UnknownName(
                    "the store has no such pack",
                    where=self.root,
                    found=f"sha256:{folder.name}",
                    remedy=nearest(f"sha256:{folder.name}", [entry.id for entry in self.list()]),
                )
            return _verify(folder)

    def list(self) -> tuple[StoredPack, ...]:
        """Returns every pack of the store, sorted by id, without hashing anything."""
        found = []
        for folder in self._folders():
            with suppress(AdapterpackError, FileNotFoundError):  # removed just now, or altered: get says so
                manifest = m.parse(_manifest(folder), folder)
                found.append(
                    StoredPack(
                        f"sha256:{folder.name}",
                        manifest.pack.name,
                        sum(file.stat().st_size for file in folder.iterdir()),
                    )
                )
        return tuple(found)

    def gc(self, keep: Iterable[str] | None = None, dry_run: bool = True) -> Garbage:
        """Removes every pack whose id is not in ``keep``, and everything that no pack needs: blobs, leftovers
        of processes that died, quarantine.

        Without ``keep`` all packs stay. With ``dry_run``, the default, nothing is removed and the report is
        the same.

        Raises:
            UnknownName: ``keep`` names a pack that the store does not have.
            Unsupported: this system has no file locks.
        """
        with self._lock(alone=True):
            folders = {folder.name: folder for folder in self._folders()}
            kept = set(folders) if keep is None else {self._pack_folder(identity).name for identity in keep}
            if missing := sorted(kept - folders.keys()):
                raise UnknownName(
                    "a pack that is to be kept is not in the store",
                    where=self.root,
                    found=f"sha256:{missing[0]}",
                    remedy="list what the store has: nothing was removed",
                )
            # Packs are hard links to blobs, so a blob is in use if a kept pack has a file with its inode.
            needed = {blobs.inode(file) for name in kept for file in folders[name].iterdir()}
            unneeded = [
                file
                for file in blobs.files(self.root / "blobs")
                if not self._is_needed(file, needed, folders, kept)
            ]
            dropped = [folders[name] for name in sorted(folders.keys() - kept)]
            loose = [*unneeded, *blobs.files(self.root / "tmp"), *blobs.files(self.root / "quarantine")]
            freed = blobs.freed_bytes([*loose, *(file for folder in dropped for file in blobs.files(folder))])
            if not dry_run:
                with storage_errors(self.root):
                    # a pack vanishes at once, by a rename, and not file by file
                    for tree in (*dropped, self.root / "quarantine"):
                        tree.rename(Path(tempfile.mkdtemp(dir=self.root / "tmp")) / "removed")
                    for file in unneeded:
                        file.unlink()
                    shutil.rmtree(self.root / "tmp")
            return Garbage(tuple(f"sha256:{folder.name}" for folder in dropped), len(loose), freed, dry_run)

    @staticmethod
    def _is_needed(
        blob: Path, needed: set[tuple[int, int]], folders: dict[str, Path], kept: set[str]
    ) -> bool:
        """Whether a kept pack links to the blob or, on file systems without links, holds a copy of it."""
        if blobs.inode(blob) in needed:
            return True
        return blob.lstat().st_nlink == 1 and any(_has_copy(folders[name], blob) for name in kept)

    def _source(self, pack: Pack | StrPath, written: Path) -> Path:
        """Returns a folder with the pack's files: its own, or a new one for a pack that has none, was renamed
        or came from PEFT.
        """
        if isinstance(pack, Pack):
            file = pack.path / m.FILE_NAME if pack.path else None
            if pack.path and file and file.is_file() and f"sha256:{sha256_of(file)}" == pack.id:
                return pack.path
            loaded = pack
        else:
            if not Path(pack).is_dir():
                raise StorageError("there is no such pack", where=pack, remedy="name the folder of a pack")
            if (Path(pack) / m.FILE_NAME).is_file():
                return Path(pack)
            loaded = load(pack)
        written.mkdir()
        loaded.write_into(written)
        return written

    def _staged(self, source: Path, staged: Path) -> tuple[Path, str]:
        """Copies the pack's files into blobs, and returns a folder of links to them and the pack's id; only
        listed files are opened.
        """
        staged.mkdir()
        put = partial(blobs.put, self.root / "blobs", self.root / "tmp")
        where = source / m.FILE_NAME
        if irregular := next(regular_files(source), None):
            raise FormatError(irregular.message, where=source / irregular.where, remedy=irregular.fix)
        with open_inside(where) as file:
            data = read_at_most(file, m.MAX_BYTES + 1)
        manifest = m.parse(data, where)
        digest = hashlib.sha256(data).hexdigest()
        blobs.link(put(where, digest, len(data)), staged / m.FILE_NAME)
        for entry in manifest.files:
            blobs.link(put(source / entry.path, entry.sha256, entry.size), staged / entry.path)
        sync(staged)
        return staged, f"sha256:{digest}"

    def _quarantine(self, folder: Path) -> tuple[str, ...]:
        """Moves a pack with altered files, and their blobs, into quarantine; returns the names of the altered
        files.
        """
        with self._lock(alone=True), storage_errors(folder):
            altered, digests = _find_altered(folder)
            if altered:  # checked again under the lock, because another process may have repaired it
                place = Path(tempfile.mkdtemp(prefix=f"{folder.name[:16]}-", dir=self.root / "quarantine"))
                folder.rename(place / "pack")
                for digest in digests:
                    blob = blobs.place(self.root / "blobs", digest)
                    if blob.is_file() and sha256_of(blob) != digest:
                        blob.rename(place / digest)
        return altered

    def _pack_folder(self, identity: str) -> Path:
        match = _ID.fullmatch(identity)
        if match is None:
            raise UnknownName(
                "this is not the id of a pack",
                where=self.root,
                expected="sha256: and 64 hex digits",
                found=identity,
            )
        return self.root / "packs" / match[1]

    def _folders(self) -> tuple[Path, ...]:
        place = self.root / "packs"
        if not place.is_dir():
            return ()
        return tuple(
            sorted(
                folder for folder in place.iterdir() if _ID.fullmatch(folder.name) and not folder.is_symlink()
            )
        )

    @contextmanager
    def _lock(self, alone: bool) -> Iterator[None]:
        """Holds the store's lock and creates the store's folders under it, because garbage collection may
        remove some while others wait.
        """
        lock = self.root / ".lock"
        with storage_errors(self.root):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            # in this order, because another process creates the lock before anything else
            if any(self.root.iterdir()) and not lock.exists():
                raise StorageError(
                    "this folder holds other things, and a store deletes what it does not know",
                    where=self.root,
                    remedy="name a new or an empty folder",
                )
        with hold_lock(lock, alone):
            for name in ("blobs", "packs", "tmp", "quarantine"):
                own_folder(self.root / name, 0o700)
            yield

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        with storage_errors(self.root):
            folder = Path(tempfile.mkdtemp(dir=self.root / "tmp"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _verify(folder: Path) -> Pack:
    """Loads the pack in a folder of the store and checks that its id is the folder's name."""
    pack = load(folder)
    if pack.id != f"sha256:{folder.name}":
        raise CorruptBlob(
            "a stored pack is not the one that its place is named by", where=folder, found=pack.id
        )
    return pack


def _find_altered(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the files of a stored pack that differ from its id and manifest, and the digests that they
    should have.
    """
    if not folder.is_dir():
        return (), ()
    file = folder / m.FILE_NAME
    if not file.is_file() or sha256_of(file) != folder.name:
        return (m.FILE_NAME,), (folder.name,)
    entries = m.parse(_manifest(folder), file).files
    bad = [
        entry
        for entry in entries
        if not (folder / entry.path).is_file() or sha256_of(folder / entry.path) != entry.sha256
    ]
    strange = {path.name for path in folder.iterdir()} - {entry.path for entry in entries} - {m.FILE_NAME}
    return (*(entry.path for entry in bad), *sorted(strange)), tuple(entry.sha256 for entry in bad)


def _manifest(folder: Path) -> bytes:
    return read_file(folder / m.FILE_NAME, m.MAX_BYTES + 1)


def _has_copy(folder: Path, blob: Path) -> bool:
    file = folder / m.FILE_NAME
    if blob.name == folder.name:
        return True
    with suppress(AdapterpackError, OSError):
        return any(entry.sha256 == blob.name for entry in m.parse(_manifest(folder), file).files)
    return False
