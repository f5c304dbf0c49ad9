"""The packs that lie in a folder, each in a folder of its own."""

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
    """The folder of one pack, which is no link."""

    path: Path

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.name

    def __str__(self) -> str:
        return str(self.path)

    def pack(self) -> Pack:
        """The pack in it.

        Raises:
            FormatError: it is a link; or as for :func:`adapterpack.load`.
            StorageError: it cannot be read.
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
    """A folder in which every folder is a pack; hidden ones, which are being written, aside."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def packs(self) -> dict[PackPlace, PlaceState]:
        """The packs that lie there now, with what changes whenever one of their files is written: size, time
        and number.

        Raises:
            StorageError: the folder cannot be listed.
        """
        return {InFolder(pack): _state(pack) for pack in _packs_in(self.path)}

    def at_start(self) -> Iterator[tuple[PackPlace, Pack]]:
        """The packs that lie there; the one who starts a server may name links."""
        return ((InFolder(pack), load(pack)) for pack in _packs_in(self.path))


def is_pack(folder: Path) -> bool:
    """Whether a folder holds a pack, or what PEFT wrote."""
    return (folder / FILE_NAME).is_file() or (folder / CONFIG).is_file()


def _packs_in(folder: Path) -> Iterator[Path]:
    with storage_errors(folder):
        inside = sorted(folder.iterdir())
    return (path for path in inside if not path.name.startswith(".") and _may_be_pack(path))


def _may_be_pack(folder: Path) -> bool:
    try:
        return is_pack(folder)
    except OSError:
        return True  # reading it says what is wrong


def _state(folder: Path) -> PlaceState:
    files = []
    try:
        with os.scandir(folder) as entries:
            for entry in islice(entries, _MOST_FILES):
                stat = entry.stat(follow_symlinks=False)
                files.append((entry.name, stat.st_size, stat.st_ctime_ns, stat.st_ino))
    except OSError:
        return ()  # it is being moved or removed: the next look says more
    return tuple(sorted(files))
