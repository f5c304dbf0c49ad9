"""Remembers which bundles were proved as far as their bytes decide, so that opening one again costs a look at its files' times.

A proof belongs to the bytes of a manifest, and with them to the digests of all files, which a session compares each time. It is kept for
the life of the process; that of a bundle with large files also in the user's cache folder, next to the hashes of these.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from ..errors import StorageError
from ..io.atomic import output_file
from ..io.cache import cache_folder
from ..io.file_hashes import LARGE
from ..version import VERSION
from .manifest import Bundle

_PROVED: set[str] = set()


def is_proved(manifest: bytes) -> bool:
    """Whether a bundle with these bytes as its manifest was proved before, by this version."""
    key = _key(manifest)
    if key not in _PROVED and _record(key).is_file():
        _PROVED.add(key)
    return key in _PROVED


def keep_proof(manifest: bytes, bundle: Bundle) -> None:
    """Remembers that the bundle with these bytes as its manifest was proved."""
    key = _key(manifest)
    if key not in _PROVED:
        _PROVED.add(key)
        if any(entry.size >= LARGE for entry in bundle.files):
            with suppress(StorageError), output_file(_record(key)) as record:  # a cache that cannot be written is no reason to fail
                record.touch()


def _key(manifest: bytes) -> str:
    return hashlib.sha256(VERSION.encode() + b"\0" + manifest).hexdigest()


def _record(key: str) -> Path:
    return cache_folder() / "proofs" / key
