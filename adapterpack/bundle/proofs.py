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
from ..io import cache_folder, output_file
from ..version import VERSION

VALID = ""
"""The check that manifest, graphs and packs are consistent; every other check has the name of a part."""
_KNOWN: set[str] = set()


class VerificationCache:
    """The results that this version has recorded for the bundle with these manifest bytes."""

    def __init__(self, manifest: bytes) -> None:
        self._manifest = hashlib.sha256(VERSION.encode() + b"\0" + manifest).hexdigest()

    def knows(self, check: str = VALID) -> bool:
        """Returns whether a check passed before: that manifest, graphs and packs are consistent, or that ONNX
        Runtime opened the graph of this part without a crash.
        """
        name = f"{self._manifest}-{check}"
        if name not in _KNOWN and _record(name).is_file():
            _KNOWN.add(name)
        return name in _KNOWN

    def remember(self, *checks: str) -> None:
        """Records that these checks passed: :data:`VALID`, or parts whose graphs were opened."""
        for check in checks:
            if not self.knows(check):
                name = f"{self._manifest}-{check}"
                _KNOWN.add(name)
                # without a writable cache the checks just run again next time
                with suppress(StorageError), output_file(_record(name)) as record:
                    record.touch()


def _record(name: str) -> Path:
    return cache_folder() / "proofs" / name
