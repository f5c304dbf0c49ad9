"""Lists the files to publish with their digests; files that were just validated are not read again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from ...errors import storage_errors
from ...io import sha256_of

_CHUNK = 1 << 20


@dataclass(frozen=True)
class LocalFile:
    """One file with its size in bytes and its SHA-256 (hex); its content is a path or bytes."""

    content: Path | bytes
    size: int
    sha256: str

    @classmethod
    def of(cls, content: Path | bytes) -> LocalFile:
        """Makes an entry for a file that no manifest lists, by reading and hashing it."""
        if isinstance(content, bytes):
            return cls(content, len(content), hashlib.sha256(content).hexdigest())
        with storage_errors(content):
            return cls(content, content.stat().st_size, sha256_of(content))

    @cached_property
    def git(self) -> str:
        """Git's blob id, by which hubs list small files; computing it reads the file."""
        hasher = hashlib.sha1(b"blob %d\x00" % self.size, usedforsecurity=False)
        with self.open() as file:
            while chunk := file.read(_CHUNK):
                hasher.update(chunk)
        return hasher.hexdigest()

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Opens its content as a binary file."""
        if isinstance(self.content, bytes):
            yield BytesIO(self.content)
        else:
            with storage_errors(self.content):
                file = self.content.open("rb")
            with file:
                yield file

    def text(self, most: int) -> bytes:
        """Reads its first ``most`` bytes."""
        with self.open() as file:
            return file.read(most)

    def part(self, start: int, length: int) -> Iterator[bytes]:
        """Yields ``length`` bytes from ``start`` on, in pieces.

        Raises:
            StorageError: the file cannot be read.
        """
        with self.open() as file, storage_errors(self.content):
            file.seek(start, os.SEEK_SET)
            while length and (chunk := file.read(min(_CHUNK, length))):
                length -= len(chunk)
                yield chunk
