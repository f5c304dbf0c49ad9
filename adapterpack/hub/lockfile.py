"""Lock files: pin pulled artifacts by reference, commit and digest, in a small file for version control."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError, storage_errors
from ..io import strict_json
from ..io.atomic import output_file
from ..io.cache import cache_folder
from ..io.locks import hold_lock
from ..io.safe_open import read_at_most
from .transport import names

FILE_NAME = "adapterpack.lock"
_FORMAT = "adapterpack.lock"
_VERSION = 1
_MAX_BYTES = 16 << 20
_ID = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class PinnedArtifact:
    """The pin of a reference: its commit, the kind of artifact, and the digest of its manifest."""

    commit: str
    kind: str
    id: str


class Lockfile:
    """The pins in one file, which several processes may change.

    Example:
        >>> Lockfile("nowhere.lock").get(names.parse("hf://org/name")) is None
        True
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
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
            value: Any = strict_json.loads(read_at_most(file, _MAX_BYTES + 1), self.path, _MAX_BYTES)
        entries = value.get("entries") if isinstance(value, dict) and value.get("format") == _FORMAT else None
        if not isinstance(entries, dict) or value.get("version") != _VERSION:
            raise FormatError(
                "this is not a lock file of this version",
                where=self.path,
                expected=f"format {_FORMAT}, version {_VERSION}",
                remedy="name another file with --lock, or remove it",
            )
        return {key: _read_pin(entry, f"{self.path}, {key}") for key, entry in entries.items()}

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
            value = {
                "format": _FORMAT,
                "version": _VERSION,
                "entries": {key: asdict(one) for key, one in entries.items()},
            }
            with output_file(self.path) as path:
                path.write_bytes(strict_json.canonical(value))


def _read_pin(entry: Any, where: str) -> PinnedArtifact:
    texts = (
        isinstance(entry, dict)
        and set(entry) == {"commit", "kind", "id"}
        and all(isinstance(item, str) for item in entry.values())
    )
    if not texts or not names.COMMIT.fullmatch(entry["commit"]) or not _ID.fullmatch(entry["id"]):
        raise FormatError(
            "a lock file's entry has a commit, a kind and an id",
            where=where,
            remedy="remove the entry, and pull again",
        )
    return PinnedArtifact(**entry)


def machine_lockfile(reference: names.HubReference) -> Lockfile:
    """Returns this machine's own record of what it pulled from a repository, for use without a network."""
    return Lockfile(cache_folder() / "hub" / f"{reference.repo.replace('/', '--')}.json")
