"""Keeps pulled artifacts on this machine: packs in the store, bundles in folders named by the digest of their
manifest.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from ..errors import AdapterpackError, CorruptBlob, FormatError, OutputExists, UnknownName, storage_errors
from ..io import cache_folder, publish
from ..pack import Pack
from ..runtime import validate_bundle
from ..store import Store


def find_bundle(kind: str, identity: str) -> Path | None:
    """Returns the folder of an artifact that was pulled before, after hashing every byte again, or None if it
    is missing or altered.
    """
    if kind != "bundle":
        try:
            return Store().get(identity).path
        except (UnknownName, CorruptBlob):
            return None
    folder = _bundles() / identity.removeprefix("sha256:")
    if not folder.is_dir():
        return None
    with suppress(AdapterpackError):
        _require_bundle(folder)
        return folder
    with storage_errors(folder):  # altered: removed, so that it can be fetched again
        shutil.rmtree(folder)
    return None


def store(kind: str, identity: str, staged: Path | Pack) -> tuple[str, Path]:
    """Validates a staged artifact and moves it into the cache. Returns its id and folder; for an imported
    adapter the id of the new pack.

    Raises:
        FormatError: the artifact is not valid; nothing is kept.
    """
    if kind != "bundle" or isinstance(staged, Pack):
        pack = Store().add(staged)
        if pack.path is None:
            raise FormatError("the store did not keep the pack", where=identity)
        return pack.id, pack.path
    _require_bundle(staged)
    target = _bundles() / identity.removeprefix("sha256:")
    with suppress(OutputExists):  # another process was faster, with the same bytes
        publish(staged, target)
    return identity, target


def _bundles() -> Path:
    return cache_folder() / "bundles"


def _require_bundle(folder: Path) -> None:
    validate_bundle(folder).require_valid()
