"""Caches the results of checks on a bundle, so that opening it again only compares the times of its files.

The key of a result is the hash of the manifest's bytes. The manifest holds the digests of all files, which a
session compares every time, so a result can never apply to other bytes. Results are kept in the user's cache
folder, next to the hashes of large files.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from ..errors import StorageError
from ..io.atomic import output_file
from ..io.cache import cache_folder
from ..version import VERSION

_KNOWN: set[str] = set()


class VerificationCache:
    """The results that this version has recorded for the bundle with these manifest bytes."""

    def __init__(self, manifest: bytes) -> None:
        self._manifest = hashlib.sha256(VERSION.encode() + b"\0" + manifest).hexdigest()

    def is_valid(self) -> bool:
        """Returns whether manifest, graphs and packs were found to be consistent."""
        return self._is_remembered(self._manifest)

    def remember_validity(self) -> None:
        """Records that manifest, graphs and packs are consistent."""
        self._remember(self._manifest)

    def was_openable(self, part: str) -> bool:
        """Returns whether ONNX Runtime has opened the graph of a part before without a crash."""
        return self._is_remembered(f"{self._manifest}-{part}")

    def remember_opening(self, *parts: str) -> None:
        """Records that ONNX Runtime opened these parts without a crash."""
        for part in parts:
            self._remember(f"{self._manifest}-{part}")

    def _is_remembered(self, name: str) -> bool:
        if name not in _KNOWN and _record(name).is_file():
            _KNOWN.add(name)
        return name in _KNOWN

    def _remember(self, name: str) -> None:
        if not self._is_remembered(name):
            _KNOWN.add(name)
            # without a writable cache the checks just run again next time
            with suppress(StorageError), output_file(_record(name)) as record:
                record.touch()


def _record(name: str) -> Path:
    return cache_folder() / "proofs" / name
