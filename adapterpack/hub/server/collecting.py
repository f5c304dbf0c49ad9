"""Garbage collection of the hub: removes unfinished uploads, and blobs that no commit names, after a day."""

from __future__ import annotations

import time
from collections.abc import Iterator

from ...errors import storage_errors
from .parts import UploadedParts
from .storage import HubStorage
from .trees import decode_files

KEPT_SECONDS = 86_400


class Collector:
    """Removes unneeded files of one hub. Commits are never removed, so a blob that a commit names needs no
    second check.
    """

    def __init__(self, storage: HubStorage, parts: UploadedParts) -> None:
        self.storage = storage
        self.parts = parts
        self._checked_until = 0.0

    def collect(self) -> int:
        """Runs one collection and returns the number of removed blobs.

        Raises:
            StorageError: the file system refuses, or a commit was altered.
        """
        until = time.time() - KEPT_SECONDS
        with storage_errors(self.storage.root):
            self.parts.remove_older(until)
            for path in (self.storage.root / "tmp").iterdir():
                if path.is_file() and not path.name.startswith(".") and path.lstat().st_mtime < until:
                    path.unlink(missing_ok=True)
            orphans = {
                path.name
                for path in (self.storage.root / "blobs").glob("*/*")
                if path.is_file() and self._checked_until <= path.lstat().st_mtime < until
            }
            if orphans:
                orphans.difference_update(self._list_named())
            gone = sum(self._remove(sha256, until) for sha256 in orphans)
        self._checked_until = until
        return gone

    def _list_named(self) -> Iterator[str]:
        """Yields the SHA-256 of everything that a commit needs, including its pages."""
        pages = set[str]()
        for repo in self.storage.repos():
            for file in sorted((self.storage.folder(repo) / "commits").glob("*.json")):
                files = self.storage.commit(repo, file.stem).files
                if not all(page.sha256 for page in files.pages):  # the format before pages
                    yield from (entry.sha256 for entry in files.values())
                    continue
                for page in files.pages:
                    if page.sha256 not in pages:
                        pages.add(page.sha256)
                        yield page.sha256
                        yield from (
                            entry.sha256
                            for entry in decode_files(self.storage.bytes_of(page.sha256)).values()
                        )

    def _remove(self, sha256: str, until: float) -> bool:
        """Removes a blob, unless it was uploaded or named meanwhile: moves it aside, checks its time again,
        and may put it back.
        """
        blob = self.storage.blob(sha256)
        with self.storage.incoming() as away:
            try:
                blob.replace(away)
            except FileNotFoundError:
                return False
            if away.lstat().st_mtime < until:
                return True
            away.replace(blob)
        return False
