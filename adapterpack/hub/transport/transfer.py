"""Bytes from a hub: never more than was asked for, redirect by redirect, in time, and hashed while they arrive."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from ...errors import FormatError, HubError, storage_errors
from .client import Listed, Remote, again, hub_errors
from .partial import arriving

_REDIRECTS = 5
_SLOWEST = 16 << 10
"""Bytes a second, after a minute of grace, below which a body is given up: else a hub could hold a client for ever."""
_GRACE = 60.0
_CHUNK = 1 << 20
Progress = Callable[[int], None]
"""Is told of more bytes that are here."""


def read(remote: Remote, path: str, start: int, length: int) -> bytes:
    """``length`` bytes of a file from ``start`` on, by a range request.

    Raises:
        FormatError: the hub sends fewer.
        HubError: it does not send that range.
    """
    def once() -> bytes:
        parts, left = [], length
        with _opened(remote, path, {"Range": f"bytes={start}-{start + length - 1}"}) as response:
            if not _goes_on(response, start, f"{remote}, {path}") and start:
                raise HubError("the hub does not send ranges", where=f"{remote}, {path}", remedy="pull it, or validate with --full")
            for chunk in _chunks(response, length, f"{remote}, {path}"):
                parts.append(chunk[:left])
                left -= len(parts[-1])
                if not left:
                    break
        if left:
            raise FormatError("the hub sends fewer bytes than the file has", where=f"{remote}, {path}", expected=f"{length} bytes",
                              found=length - left)
        return b"".join(parts)

    with hub_errors(remote):
        return again(once) if length else b""


def fetch(remote: Remote, listed: Listed, target: Path, sha256: str | None = None, progress: Progress | None = None) -> None:
    """Downloads one file into a new one, hashed on the way against ``sha256`` or what the tree lists; never more than it lists.

    What breaks off goes on where it was: within this call, and of large files also in a later one, by the sha256.

    Raises:
        FormatError: the bytes are others; nothing is left.
        HubError: the hub does not send them.
    """
    with arriving(target, sha256 or listed.sha256, listed.size) as place:
        coming = _Coming(remote, listed, place, sha256, progress)
        resumed = coming.left < listed.size
        with hub_errors(remote):
            again(coming.more)
            if resumed and not coming.whole:  # what was kept is not the beginning of this file
                coming.restart()
                again(coming.more)
        coming.require_whole()


class _Coming:
    """A file on its way: how much of it is here, and the digests of that."""

    def __init__(self, remote: Remote, listed: Listed, place: Path, sha256: str | None, progress: Progress | None) -> None:
        self.remote, self.listed, self.place, self.progress = remote, listed, place, progress
        self.where, self.wanted = f"{remote}, {listed.path}", sha256
        self.restart()
        if place.exists():
            with storage_errors(place), place.open("rb") as file:
                while (chunk := file.read(_CHUNK)) and self.left >= 0:
                    self._take(chunk)

    def restart(self) -> None:
        """Forgets what is here."""
        self.left = self.listed.size
        self.content = hashlib.sha256()
        self.git = hashlib.sha1(b"blob %d\x00" % self.listed.size, usedforsecurity=False) if self.listed.git else None

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
        """The rest of it, from where it broke off; from its beginning where the hub does not send ranges."""
        start = self.listed.size - self.left
        if self.left <= 0 and start:
            return
        with _opened(self.remote, self.listed.path, {"Range": f"bytes={start}-"} if start else {}) as response:
            if start and not _goes_on(response, start, self.where):
                self.restart()
                start = 0
            with storage_errors(self.place), self.place.open("r+b" if start else "wb") as file:
                file.seek(start)
                for chunk in _chunks(response, self.listed.size, self.where):
                    self._take(chunk)
                    if self.left < 0:
                        return
                    file.write(chunk)

    @property
    def whole(self) -> bool:
        """Whether it is all here, and what was listed."""
        wanted = [(self.content.hexdigest(), self.wanted), (self.content.hexdigest(), self.listed.sha256),
                  (self.git and self.git.hexdigest(), self.listed.git)]
        return not self.left and all(known in {None, found} for found, known in wanted)

    def require_whole(self) -> None:
        """Goes on only if what arrived is what was listed."""
        if not self.whole:
            what = "truncated" if self.left > 0 else "longer than listed" if self.left else "altered"
            raise FormatError(f"the hub sends another file than is listed: it is {what}", where=self.where,
                              expected=f"{self.listed.size} bytes, {self.wanted or self.listed.sha256 or self.listed.git}",
                              remedy="try again; if it stays so, do not use this hub")


def _goes_on(response: Any, start: int, where: str) -> bool:
    """Whether a response is the rest from ``start`` on; False if it is the whole.

    Raises:
        HubError: it is another range.
    """
    told = response.headers.get("Content-Range", "")
    if response.status_code == 206 and not told.startswith(f"bytes {start}-"):
        raise HubError("the hub sends another range than was asked for", where=where, expected=f"bytes {start}-",
                       found=told[:80] or "no Content-Range")
    return bool(response.status_code == 206)


@contextmanager
def _opened(remote: Remote, path: str, headers: dict[str, str]) -> Iterator[Any]:
    """The response with the bytes: redirects are followed here, so that the token stays with the hub that it is for."""
    from huggingface_hub import constants  # noqa: PLC0415
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # noqa: PLC0415

    url = f"{remote.endpoint}/{remote.repo}/resolve/{remote.commit}/{quote(remote.path(path))}"
    own, sent = urlsplit(url), {**build_hf_headers(token=remote.token), "Accept-Encoding": "identity", **headers}
    for hop in range(_REDIRECTS + 1):
        here = urlsplit(url)
        if same := (here.scheme, here.netloc) == (own.scheme, own.netloc):
            allowed = sent
        else:
            allowed = {key: value for key, value in sent.items() if key.lower() not in {"authorization", "cookie"}}
        options = {"headers": allowed, "follow_redirects": False, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}
        with get_session().stream("GET", url, **options) as response:
            if hop == 0 and response.status_code < 400 and response.headers.get("X-Repo-Commit") != remote.commit:
                raise HubError("the hub does not say that these bytes are of the commit that was asked for", where=f"{remote}, {path}",
                               expected=remote.commit, found=response.headers.get("X-Repo-Commit", "no X-Repo-Commit")[:80])
            if response.status_code in {301, 302, 303, 307, 308}:
                url = urljoin(url, response.headers.get("Location", ""))
                if urlsplit(url)[:2] != own[:2] and urlsplit(url).scheme != "https":
                    raise HubError("the hub sends its clients to an address that is neither its own nor https", where=f"{remote}, {path}",
                                   found=urlsplit(url).hostname, remedy="do not use this hub")
                continue
            if response.status_code >= 400:
                response.read()
                if "X-Xet-Hash" in response.headers:
                    raise HubError("the hub gives this file through the Xet service only", where=f"{remote}, {path}",
                                   remedy="fetch the folder with the hub's own client (hf download), and name the folder")
                if not same:
                    raise HubError(f"the host that keeps the hub's files answers {response.status_code}", where=f"{remote}, {path}",
                                   found=here.hostname)
            hf_raise_for_status(response)
            yield response
            return
    raise HubError("the hub sends its clients in circles", where=f"{remote}, {path}", expected=f"at most {_REDIRECTS} redirects")


def _chunks(response: Any, size: int, where: str) -> Iterator[bytes]:
    """The body, as long as it comes in time: a client's own timeout only looks at the pause between two bytes."""
    from huggingface_hub import constants  # noqa: PLC0415

    started, limit = time.monotonic(), min(_GRACE, 6.0 * constants.HF_HUB_DOWNLOAD_TIMEOUT) + size / _SLOWEST
    for chunk in response.iter_raw():
        if time.monotonic() - started > limit:
            raise HubError("the hub sends too slowly", where=where, expected=f"{size} bytes within {limit:.0f} s",
                           remedy="try again, or raise HF_HUB_DOWNLOAD_TIMEOUT")
        yield chunk
