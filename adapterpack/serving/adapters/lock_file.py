"""Loads the packs that a lock file pins, from the store or from their hub at the pinned commit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import StorageError, UnknownAdapter
from ...hub.lockfile import Lockfile, PinnedArtifact
from ...hub.pull import pinned_artifact
from ...hub.transport import names
from ...pack.pack import Pack
from ...pack.validate.validation import load
from .adapter_source import PackPlace, PlaceState


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
        return load(pinned_artifact(names.parse(self.name), pinned))


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
