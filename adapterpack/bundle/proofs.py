"""Remembers what was found of a bundle's bytes, so that opening it again costs a look at its files' times.

What was found belongs to the bytes of a manifest, and with them to the digests of all files, which a session
compares each time. It is kept in the user's cache folder, next to the hashes of large files.
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
    """What this version found of the bundle with these bytes as its manifest."""

    def __init__(self, manifest: bytes) -> None:
        self._manifest = hashlib.sha256(VERSION.encode() + b"\0" + manifest).hexdigest()

    def is_valid(self) -> bool:
        """Whether manifest, graphs and packs fit each other."""
        return self._is_remembered(self._manifest)

    def remember_validity(self) -> None:
        """Remembers that they do."""
        self._remember(self._manifest)

    def was_openable(self, part: str) -> bool:
        """Whether ONNX Runtime opened the graph of a part before and the process lived on."""
        return self._is_remembered(f"{self._manifest}-{part}")

    def remember_opening(self, *parts: str) -> None:
        """Remembers that it did, of each of them."""
        for part in parts:
            self._remember(f"{self._manifest}-{part}")

    def _is_remembered(self, name: str) -> bool:
        if name not in _KNOWN and _record(name).is_file():
            _KNOWN.add(name)
        return name in _KNOWN

    def _remember(self, name: str) -> None:
        if not self._is_remembered(name):
            _KNOWN.add(name)
            # a cache that cannot be written is no reason to fail
            with suppress(StorageError), output_file(_record(name)) as record:
                record.touch()


def _record(name: str) -> Path:
    return cache_folder() / "proofs" / name
