"""The places from which a server gets packs: folders in which every pack has a folder of its own, lock files,
whose packs come from the store or from their hub at the pinned commit, and owners on a hub.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ...base import is_repo
from ...errors import ConfigError, FormatError, StorageError, UnknownAdapter, storage_errors
from ...hub import is_remote
from ...hub.lockfile import Lockfile, PinnedArtifact
from ...hub.pull import local_copy, pinned_artifact
from ...hub.transport import names, parse_address
from ...manifest import FILE_NAME
from ...pack import Pack
from ...pack.validate import list_pack, load
from ...paths import StrPath
from ...peft import CONFIG

_MOST_FILES = 1000
PlaceState = Hashable
"""Differs from an earlier state of the same place whenever its pack may have changed."""


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
        return {InFolder(pack): _state(pack) for pack in packs_in(self.path)}

    def find(self, name: str) -> PackPlace | None:
        """Returns the place of the pack in the folder with this name, or None.

        Raises:
            StorageError: the folder cannot be listed.
        """
        with storage_errors(self.path):
            return next((InFolder(pack) for pack in packs_in(self.path) if pack.name == name), None)

    def at_start(self) -> Iterator[tuple[PackPlace, Pack]]:
        """Yields the packs in the folder, listed. At the start links are followed, because the person who
        starts the server named the folder.
        """
        return ((InFolder(pack), list_pack(pack)) for pack in packs_in(self.path))


def is_pack(folder: Path) -> bool:
    """Returns whether a folder holds a pack or a PEFT adapter."""
    return (folder / FILE_NAME).is_file() or (folder / CONFIG).is_file()


def packs_in(folder: Path) -> Iterator[Path]:
    """Returns the folders of the packs in a folder, sorted.

    Raises:
        StorageError: the folder cannot be listed.
    """
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


@dataclass(frozen=True)
class Pin:
    """One entry of a lock file: a reference to a hub."""

    lock: Path
    name: str

    def __str__(self) -> str:
        return f"{self.lock}, {self.name}"

    def pack(self) -> Pack:
        """Loads the pack with the pinned digest.

        Raises:
            UnknownAdapter: the lock file no longer has the entry.
            FormatError: the hub has another artifact, or an invalid one, at that commit.
            HubError: the hub cannot be reached or refuses.
        """
        pinned = _read_pins(self.lock).get(self.name)
        if pinned is None:
            raise UnknownAdapter("the lock file has no such entry", where=self.lock, found=self.name)
        return load(pinned_artifact(parse_address(self.name), pinned))


@dataclass(frozen=True)
class LockFile:
    """A lock file that ``adapterpack pull`` wrote. Its bundles are ignored."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def packs(self) -> dict[PackPlace, PlaceState]:
        """Returns its entries, each with its pin as state.

        Raises:
            FormatError: the file is no lock file.
            StorageError: the file cannot be read.
        """
        return {Pin(self.path, reference): pinned for reference, pinned in _read_pins(self.path).items()}

    def find(self, name: str) -> PackPlace | None:
        """Returns the place of the first entry for this reference, or for a repository or folder of this
        name, or None.

        Raises:
            FormatError, StorageError: as :meth:`packs`.
        """
        named = (one for one in _read_pins(self.path) if name in (one, parse_address(one).name))
        return next((Pin(self.path, one) for one in named), None)

    def at_start(self) -> Iterator[tuple[PackPlace, Pack]]:
        """Yields the packs that it pins."""
        return ((place, place.pack()) for place in self.packs())


def _read_pins(path: Path) -> dict[str, PinnedArtifact]:
    if not path.is_file():
        raise StorageError(
            "there is no lock file",
            where=path,
            remedy="write one: adapterpack pull hf://org/name --lock FILE",
        )
    return {
        reference: pinned for reference, pinned in Lockfile(path).all().items() if pinned.kind != "bundle"
    }


@dataclass(frozen=True)
class OnHub:
    """A pack on a hub: ``hf://owner/name``."""

    name: str

    def __str__(self) -> str:
        return self.name

    def pack(self) -> Pack:
        """Pulls the pack into the store, and loads it.

        Raises:
            FormatError: it is not valid, or no pack.
            HubError: the hub cannot be reached or refuses.
        """
        folder = local_copy(names.parse(self.name), ("pack", "peft"))
        if folder is None:
            raise FormatError("there is no adapter in this repository", where=self)
        return load(folder)


@dataclass(frozen=True)
class HubOwner:
    """An owner on a hub, as ``hf://owner``, whose packs are found by name and not listed."""

    owner: str

    def find(self, name: str) -> PackPlace | None:
        """Returns the place of the repository with this name, whether or not there is one."""
        return OnHub(f"{names.SCHEME}{self.owner}/{name}") if is_repo(f"{self.owner}/{name}") else None


PackPlace = InFolder | Pin | OnHub
"""The place of one pack. Operators use its ``name``; its string form appears in the log."""
AdapterSource = PackFolder | LockFile
"""A source that lists places."""
NamedSource = AdapterSource | HubOwner
"""A source that finds places by name."""


def source_on_request(source: StrPath) -> NamedSource:
    """Returns the source from which requests may have packs by name.

    Raises:
        ConfigError: it is a repository of a hub, or no owner.
        StorageError: there is no such folder or file.
    """
    if is_remote(source):
        owner = str(source).removeprefix(names.SCHEME)
        if not is_repo(f"{owner}/x"):
            raise ConfigError(
                "this is no owner on a hub", where=source, expected="hf://OWNER", remedy="leave out the name"
            )
        return HubOwner(owner)
    listed = listed_source(Path(source))
    listed.find("-")  # fails now rather than in a request
    return listed


def listed_source(path: Path) -> AdapterSource:
    """Returns a lock file, or the folder of packs that a path is."""
    return LockFile(path) if path.is_file() else PackFolder(path)
