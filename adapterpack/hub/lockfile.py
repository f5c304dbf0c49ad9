"""Lock files: pin pulled artifacts by reference, commit and digest, in a small file for version control."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from ..errors import storage_errors
from ..io import (
    ClosedStruct,
    cache_folder,
    hold_lock,
    output_file,
    read_at_most,
    strict_json,
    typed_json,
)
from ..manifest import Sha256
from ..paths import StrPath
from .transport import names

FILE_NAME = "adapterpack.lock"
_FORMAT: Literal["adapterpack.lock"] = "adapterpack.lock"
_MAX_BYTES = 16 << 20


class PinnedArtifact(ClosedStruct):
    """The pin of a reference: its commit, or in a registry the digest of the OCI manifest; the kind of
    artifact; and the digest of its manifest.
    """

    commit: Annotated[str, Meta(pattern=r"^([0-9a-f]{40}|sha256:[0-9a-f]{64})\Z")]
    kind: str
    id: Sha256


class LockedPins(ClosedStruct):
    """The content of a lock file."""

    format: Literal["adapterpack.lock"]
    version: Literal[1]
    entries: dict[str, PinnedArtifact]


class Lockfile:
    """The pins in one file, which several processes may change.

    Example:
        >>> Lockfile("nowhere.lock").get(names.parse("hf://org/name")) is None
        True
    """

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)

    def get(self, reference: names.HubReference) -> PinnedArtifact | None:
        """Returns the pin of a reference, or None.

        Raises:
            FormatError: the file is something else.
        """
        return self.all().get(str(reference))

    def all(self) -> dict[str, PinnedArtifact]:
        """Returns all pins by reference; none if there is no file.

        Raises:
            FormatError: the file is something else.
        """
        if not self.path.exists():
            return {}
        with storage_errors(self.path), self.path.open("rb") as file:
            value = strict_json.loads(read_at_most(file, _MAX_BYTES + 1), self.path, _MAX_BYTES)
        return typed_json.require(
            value,
            LockedPins,
            "this is not a lock file of this version",
            self.path,
            expected=f"{_FORMAT}, version 1, and a commit, a kind and an id in each entry",
            remedy="name another file with --lock, or remove it and pull again",
        ).entries

    def put(self, reference: names.HubReference, pinned: PinnedArtifact) -> None:
        """Pins a reference, and replaces the file atomically.

        Raises:
            FormatError: the file is no lock file; it stays unchanged.
            StorageError: the file cannot be written.
        """
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        guard = cache_folder() / "locks"
        with storage_errors(guard):
            guard.mkdir(parents=True, exist_ok=True)
        with hold_lock(guard / "lockfile", alone=os.name == "posix"):
            entries = {**self.all(), str(reference): pinned}
            with output_file(self.path) as path:
                path.write_bytes(strict_json.canonical(LockedPins(_FORMAT, 1, entries)))


def machine_lockfile(reference: names.HubReference) -> Lockfile:
    """Returns this machine's own record of what it pulled from a repository, for use without a network."""
    return Lockfile(cache_folder() / "hub" / f"{reference.repo.replace('/', '--').replace(':', '+')}.json")
