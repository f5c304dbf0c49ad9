"""Downloads files from a hub, hashed on arrival and never more bytes than expected. Partial downloads of
large files are kept for the next try, by their SHA-256; nothing else reads them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ...errors import FormatError, HubError, storage_errors
from ...io import CAN_LOCK, cache_folder, own_folder, take_lock
from .client import ListedFile, Remote, hub_errors, with_retries
from .http import in_time

LARGE = 8 << 20
"""The least size of a file whose partial download is kept."""
_KEPT_SECONDS = 7 * 86_400
_CHUNK = 1 << 20
Progress = Callable[[int], None]
"""Called with the number of bytes that have arrived since the last call."""


def read_range(remote: Remote, path: str, start: int, length: int) -> bytes:
    """Reads ``length`` bytes of a file from ``start`` on, by a range request.

    Raises:
        FormatError: the hub sends fewer bytes.
        HubError: the hub does not send that range.
    """

    def once() -> bytes:
        parts = []
        left = length
        with remote.open(path, {"Range": f"bytes={start}-{start + length - 1}"}) as response:
            if not _is_rest(response, start, f"{remote}, {path}") and start:
                raise HubError(
                    "the hub does not send ranges",
                    where=f"{remote}, {path}",
                    remedy="pull it, or validate with --full",
                )
            for chunk in in_time(response.iter_raw(), f"{remote}, {path}"):
                parts.append(chunk[:left])
                left -= len(parts[-1])
                if not left:
                    break
        if left:
            raise FormatError(
                "the hub sends fewer bytes than the file has",
                where=f"{remote}, {path}",
                expected=f"{length} bytes",
                found=length - left,
            )
        return b"".join(parts)

    with hub_errors(remote):
        return with_retries(once) if length else b""


def fetch(
    remote: Remote,
    listed: ListedFile,
    target: Path,
    sha256: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Downloads one file and checks it against ``sha256`` or the digest in the listing; never reads more
    bytes than are listed.

    An interrupted download resumes where it stopped: within this call, and for large files with a known
    digest also in a later one.

    Raises:
        FormatError: the bytes differ; nothing is kept.
        HubError: the hub does not send them.
    """
    with partial_file(target, sha256 or listed.sha256, listed.size) as place:
        download = _Download(remote, listed, place, sha256, progress)
        resumed = download.left < listed.size
        with hub_errors(remote):
            with_retries(download.more)
            if resumed and not download.whole:  # the kept bytes were not the beginning of this file
                download.restart()
                with_retries(download.more)
        download.require_complete()


class _Download:
    """The state of one download: how much has arrived, and its digests so far."""

    def __init__(
        self, remote: Remote, listed: ListedFile, place: Path, sha256: str | None, progress: Progress | None
    ) -> None:
        self.remote = remote
        self.listed = listed
        self.place = place
        self.progress = progress
        self.where = f"{remote}, {listed.path}"
        self.wanted = sha256
        self.restart()
        if place.exists():
            with storage_errors(place), place.open("rb") as file:
                while (chunk := file.read(_CHUNK)) and self.left >= 0:
                    self._take(chunk)

    def restart(self) -> None:
        """Starts over."""
        self.left = self.listed.size
        self.content = hashlib.sha256()
        self.git = (
            hashlib.sha1(b"blob %d\x00" % self.listed.size, usedforsecurity=False)
            if self.listed.git
            else None
        )

    def _take(self, chunk: bytes) -> None:
        self.left -= len(chunk)
        if self.left < 0:
            return
        self.content.update(chunk)
        if self.git is not None:
            self.git.update(chunk)
        if self.progress is not None:
            self.progress(len(chunk))

    def more(self) -> None:
        """Downloads the rest; from the beginning if the hub does not send ranges."""
        start = self.listed.size - self.left
        if self.left <= 0 and start:
            return
        with self.remote.open(self.listed.path, {"Range": f"bytes={start}-"} if start else {}) as response:
            if start and not _is_rest(response, start, self.where):
                self.restart()
                start = 0
            with storage_errors(self.place), self.place.open("r+b" if start else "wb") as file:
                file.seek(start)
                for chunk in in_time(response.iter_raw(), self.where):
                    self._take(chunk)
                    if self.left < 0:
                        return
                    file.write(chunk)

    @property
    def whole(self) -> bool:
        """Whether the complete file has arrived and matches the listing."""
        wanted = [
            (self.content.hexdigest(), self.wanted),
            (self.content.hexdigest(), self.listed.sha256),
            (self.git and self.git.hexdigest(), self.listed.git),
        ]
        return not self.left and all(known in {None, found} for found, known in wanted)

    def require_complete(self) -> None:
        """Checks that the complete file has arrived and matches the listing."""
        if not self.whole:
            what = "truncated" if self.left > 0 else "longer than listed" if self.left else "altered"
            raise FormatError(
                f"the hub sends another file than is listed: it is {what}",
                where=self.where,
                expected=f"{self.listed.size} bytes, {self.wanted or self.listed.sha256 or self.listed.git}",
                remedy="try again; if it stays so, do not use this hub",
            )


def _is_rest(response: Any, start: int, where: str) -> bool:
    """Returns whether a response is the rest of the file from ``start`` on; False if it is the complete file.

    Raises:
        HubError: the response is another range.
    """
    sent = response.headers.get("Content-Range", "")
    if response.status_code == 206 and not sent.startswith(f"bytes {start}-"):
        raise HubError(
            "the hub sends another range than was asked for",
            where=where,
            expected=f"bytes {start}-",
            found=sent[:80] or "no Content-Range",
        )
    return bool(response.status_code == 206)


@contextmanager
def partial_file(target: Path, sha256: str | None, size: int) -> Iterator[Path]:
    """Yields the path to which to write an incoming file, which may already contain its beginning. On success
    the file is moved to ``target``.

    On failure a large file with a known SHA-256 is kept, unless its bytes are wrong; any other file is
    removed.

    Raises:
        StorageError: the file system refuses.
    """
    if sha256 is not None and size >= LARGE:
        with _lock(sha256) as place:
            if place is not None:
                try:
                    yield place
                except FormatError:
                    place.unlink(missing_ok=True)
                    raise
                except KeyboardInterrupt as interrupt:
                    if place.exists():
                        here = place.stat().st_size
                        interrupt.add_note(
                            f"{here} of {size} bytes of {target.name} are kept for a week: the same "
                            "command goes on there"
                        )
                    raise
                with storage_errors(target):
                    place.replace(target)
                return
    try:
        yield target
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def remove_old(folder: Path, seconds: float) -> None:
    """Removes the entries of a folder that have not changed for so long."""
    for path in folder.iterdir():
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > seconds:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


@contextmanager
def _lock(sha256: str) -> Iterator[Path | None]:
    """Yields the path of a partial file while no other process writes to it, else None."""
    folder = own_folder(cache_folder() / "partial")
    with storage_errors(folder):
        remove_old(folder, _KEPT_SECONDS)
        descriptor = os.open(folder / f"{sha256}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        taken = False
        with suppress(OSError):  # a file system without locks
            taken = CAN_LOCK and take_lock(descriptor)
        yield folder / sha256 if taken else None
    finally:
        os.close(descriptor)
