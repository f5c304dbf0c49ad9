"""The packs that lie in some folders. A pack is named by the name of its own folder, which is looked up, and never joined to a path."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from ...errors import ConfigError, FormatError, UnknownAdapter, storage_errors
from ...manifest.manifest import FILE_NAME
from ...pack.pack import Pack
from ...pack.validate.validation import load
from ...peft.layout import CONFIG

Fingerprint = tuple[tuple[str, int, int, int], ...]
"""The files of a folder, with what changes whenever one of them is written: size, time of the last change, and number."""
_MOST_FILES = 1000


class PackFolders:
    """Folders in which every folder is a pack; hidden ones, which are being written, aside."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(folders)

    def packs(self) -> dict[Path, Fingerprint]:
        """The packs that lie there now.

        Raises:
            StorageError: a folder cannot be listed.
        """
        return {pack: _fingerprint(pack) for folder in self._folders for pack in packs_in(folder)}

    def named(self, name: str) -> Path:
        """The one pack whose folder has a name.

        Raises:
            UnknownAdapter: none has.
            ConfigError: several have.
        """
        paths = [pack for pack in self.packs() if pack.name == name]
        if not paths:
            raise UnknownAdapter("no pack in the folders of adapters has this name", found=repr(name[:200]),
                                 expected="the name of a pack's folder, and no path")
        if len(paths) > 1:
            raise ConfigError("several packs in the folders of adapters have this name", found=repr(name),
                              remedy="rename one of the folders")
        return paths[0]


def is_pack(folder: Path) -> bool:
    """Whether a folder holds a pack, or what PEFT wrote."""
    return (folder / FILE_NAME).is_file() or (folder / CONFIG).is_file()


def packs_in(folder: Path) -> Iterator[Path]:
    """The packs in a folder, in the order of their names.

    Raises:
        StorageError: it cannot be listed.
    """
    with storage_errors(folder):
        inside = sorted(folder.iterdir())
    return (path for path in inside if not path.name.startswith(".") and _may_be_pack(path))


def regular_pack(folder: Path) -> Pack:
    """The pack in a folder that is no link.

    Raises:
        FormatError: it is a link; or as for :func:`adapterpack.load`.
        StorageError: it cannot be read.
    """
    if folder.is_symlink():
        raise FormatError("a link is not followed", where=folder, expected="a folder", remedy="move or copy the pack into this place")
    with storage_errors(folder):
        return load(folder)


def _may_be_pack(folder: Path) -> bool:
    try:
        return is_pack(folder)
    except OSError:
        return True  # reading it says what is wrong


def _fingerprint(folder: Path) -> Fingerprint:
    files = []
    try:
        with os.scandir(folder) as entries:
            for entry in islice(entries, _MOST_FILES):
                stat = entry.stat(follow_symlinks=False)
                files.append((entry.name, stat.st_size, stat.st_ctime_ns, stat.st_ino))
    except OSError:
        return ()  # it is being moved or removed: the next look says more
    return tuple(sorted(files))
