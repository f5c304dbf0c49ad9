"""Loads the packs in a folder in which every pack has a folder of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ...errors import FormatError, storage_errors
from ...manifest.manifest import FILE_NAME
from ...pack.pack import Pack
from ...pack.validate.validation import load
from ...peft.layout import CONFIG
from .adapter_source import PackPlace, PlaceState

_MOST_FILES = 1000


@dataclass(frozen=True)
class InFolder:
    """The folder of one pack, which must not be a link."""

    path: Path

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.name

    def __str__(self) -> str:
        return str(self.path)

    def pack(self) -> Pack:
        """Loads the pack in the folder.

        Raises:
            FormatError: the folder is a link, or see :func:`adapterpack.load`.
            StorageError: the folder cannot be read.
        """
        if self.path.is_symlink():
            raise FormatError(
                "a link is not followed",
                where=self.path,
                expected="a folder",
                remedy="move or copy the pack into this place",
            )
        with storage_errors(self.path):
            return load(self.path)


@dataclass(frozen=True)
class PackFolder:
    """A folder of which every subfolder is a pack. Hidden subfolders are ignored, because tools write packs
    there first.
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def packs(self) -> dict[PackPlace, PlaceState]:
        """Returns the packs in the folder, each with a state that changes whenever one of its files is
        written: sizes, times and inode numbers.

        Raises:
            StorageError: the folder cannot be listed.
        """
        return {InFolder(pack): _state(pack) for pack in _packs_in(self.path)}

    def at_start(self) -> Iterator[tuple[PackPlace, Pack]]:
        """Yields the packs in the folder. At the start links are followed, because the person who starts the
        server named the folder.
        """
        return ((InFolder(pack), load(pack)) for pack in _packs_in(self.path))


def is_pack(folder: Path) -> bool:
    """Returns whether a folder holds a pack or a PEFT adapter."""
    return (folder / FILE_NAME).is_file() or (folder / CONFIG).is_file()


def _packs_in(folder: Path) -> Iterator[Path]:
    with storage_errors(folder):
        inside = sorted(folder.iterdir())
    return (path for path in inside if not path.name.startswith(".") and _may_be_pack(path))


def _may_be_pack(folder: Path) -> bool:
    try:
        return is_pack(folder)
    except OSError:
        return True  # loading it will report the problem


def _state(folder: Path) -> PlaceState:
    files = []
    try:
        with os.scandir(folder) as entries:
            for entry in islice(entries, _MOST_FILES):
                stat = entry.stat(follow_symlinks=False)
                files.append((entry.name, stat.st_size, stat.st_ctime_ns, stat.st_ino))
    except OSError:
        return ()  # the folder is being moved or removed; the next look decides
    return tuple(sorted(files))
