"""A repository at one commit, as a hub tells of it: what it lists, and bytes that are never more than was asked for."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urljoin, urlsplit

from ..errors import (
    AdapterpackError,
    FormatError,
    GatedRepo,
    HubConflict,
    HubError,
    HubOffline,
    RepoNotFound,
    RevisionNotFound,
    storage_errors,
)
from . import names

_T = TypeVar("_T")
MAX_LISTED = 20_000
_TRIES = 4
_FIRST_WAIT = 0.25
_LONGEST_WAIT = 60.0
_REDIRECTS = 5
_SLOWEST = 16 << 10
"""Bytes a second, after a minute of grace, below which a body is given up: else a hub could hold a client for ever."""
_GRACE = 60.0
_SECRET = re.compile(r"hf_[A-Za-z0-9]{6,}|(?<=://)[^/\s@]+@|(?<=[Bb]earer )\S+")
_AGAIN = frozenset({429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Listed:
    """One file of a tree: its size in bytes, and its sha256 (large files) or git's blob id, as hex."""

    path: str
    size: int
    sha256: str | None
    git: str | None


@dataclass(frozen=True)
class Remote:
    """A repository at a commit. ``token`` is the one that was given, or None for the user's own."""

    repo: str
    revision: str
    commit: str
    endpoint: str
    token: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{names.SCHEME}{self.repo}@{self.commit}"


def endpoint() -> str:
    """The hub that is asked: ``HF_ENDPOINT``, or the public one."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbids the network."""
    from huggingface_hub import constants  # noqa: PLC0415 - only a named hub pays for it

    return bool(constants.HF_HUB_OFFLINE)


def api(token: str | None = None) -> Any:
    """The official client of the hub."""
    from huggingface_hub import HfApi  # noqa: PLC0415

    return HfApi(endpoint=endpoint(), token=token)


def connect(reference: names.Reference, token: str | None = None) -> Remote:
    """The repository, its revision resolved to a commit.

    Raises:
        RepoNotFound, GatedRepo, RevisionNotFound: by name.
        HubError: anything else that the hub does or fails to do.
    """
    with hub_errors(reference):
        info = again(lambda: api(token).model_info(reference.repo, revision=reference.revision))
    commit = info.sha
    if not isinstance(commit, str) or not names.COMMIT.fullmatch(commit):
        raise HubError("the hub does not say which commit this is", where=reference, expected="40 hex digits", found=str(commit)[:80])
    if names.COMMIT.fullmatch(reference.revision) and commit != reference.revision:
        raise HubError("the hub answers with another commit than was asked for", where=reference, found=commit)
    if info.id.casefold() != reference.repo.casefold():
        raise HubError("the repository has moved, and its old name may belong to somebody else by now", where=reference, found=info.id,
                       remedy=f"if that is the one you mean, name {info.id}")
    return Remote(reference.repo, reference.revision, commit, endpoint(), token)


def tree(remote: Remote) -> dict[str, Listed]:
    """Every file of the commit by path, all pages; each path is one that may become a file here.

    Raises:
        FormatError: too many, a path that leads out of its folder, or an entry that says nothing.
        HubError: the hub does not answer as it should.
    """
    def pages() -> list[Any]:
        found: list[Any] = []
        for item in api(remote.token).list_repo_tree(remote.repo, recursive=True, revision=remote.commit):
            found.append(item)
            if len(found) > MAX_LISTED:
                raise FormatError("the repository lists too many files", where=remote, expected=f"at most {MAX_LISTED}")
        return found

    with hub_errors(remote):
        items = [item for item in again(pages) if hasattr(item, "blob_id")]
    names.require_safe([str(item.path) for item in items], remote)
    found: dict[str, Listed] = {}
    for item in items:
        large = item.lfs
        one = Listed(item.path, item.size, large.sha256 if large else None, None if large else item.blob_id)
        digest = one.sha256 or one.git
        if type(one.size) is not int or one.size < 0 or (large and large.size != one.size) or \
                not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", str(digest)):
            raise FormatError("the hub lists a file without its size and digest", where=f"{remote}, {item.path}")
        found[item.path] = one
    return found


def read(remote: Remote, path: str, start: int, length: int) -> bytes:
    """``length`` bytes of a file from ``start`` on, by a range request.

    Raises:
        FormatError: the hub sends fewer.
        HubError: it does not send that range.
    """
    def once() -> bytes:
        parts, left = [], length
        with _opened(remote, path, {"Range": f"bytes={start}-{start + length - 1}"}) as response:
            told = response.headers.get("Content-Range", "")
            if response.status_code == 206:
                if not told.startswith(f"bytes {start}-"):
                    raise HubError("the hub sends another range than was asked for", where=f"{remote}, {path}",
                                   expected=f"bytes {start}-{start + length - 1}", found=told[:80] or "no Content-Range")
            elif start:
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


def fetch(remote: Remote, listed: Listed, target: Path, sha256: str | None = None) -> None:
    """Downloads one file into a new one, hashed on the way against ``sha256`` or what the tree lists; never more than it lists.

    Raises:
        FormatError: the bytes are others; nothing is left.
        HubError: the hub does not send them.
    """
    where = f"{remote}, {listed.path}"

    def once() -> None:
        content, git = hashlib.sha256(), hashlib.sha1(b"blob %d\x00" % listed.size, usedforsecurity=False)
        left = listed.size
        with _opened(remote, listed.path, {}) as response, storage_errors(target), target.open("wb") as file:
            for chunk in _chunks(response, listed.size, where):
                left -= len(chunk)
                if left < 0:
                    break
                content.update(chunk)
                git.update(chunk)
                file.write(chunk)
        known = [(content.hexdigest(), sha256), (content.hexdigest(), listed.sha256), (git.hexdigest(), listed.git)]
        if left or any(wanted not in {None, found} for found, wanted in known):
            what = "truncated" if left > 0 else "longer than listed" if left else "altered"
            raise FormatError(f"the hub sends another file than is listed: it is {what}", where=where, expected=f"{listed.size} bytes, "
                              f"{sha256 or listed.sha256 or listed.git}", remedy="try again; if it stays so, do not use this hub")

    with hub_errors(remote):
        try:
            again(once)
        except BaseException:
            target.unlink(missing_ok=True)
            raise


@contextmanager
def _opened(remote: Remote, path: str, headers: dict[str, str]) -> Iterator[Any]:
    """The response with the bytes: redirects are followed here, so that the token stays with the hub that it is for."""
    from huggingface_hub import constants  # noqa: PLC0415
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # noqa: PLC0415

    url = f"{remote.endpoint}/{remote.repo}/resolve/{remote.commit}/{quote(path)}"
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


def again(ask: Callable[[], _T]) -> _T:
    """What ``ask`` gives, asked up to four times while the hub is busy, fails or breaks off; it says itself how long to wait."""
    wait = _FIRST_WAIT
    for tries in range(_TRIES):
        try:
            return ask()
        except AdapterpackError:
            raise
        except Exception as error:
            status, headers = _status(error)
            passing = status in _AGAIN if status else "transport" in _kinds(error)
            if not passing or tries == _TRIES - 1:
                raise
            told = headers.get("Retry-After", "")
            time.sleep(min(float(told), _LONGEST_WAIT) if told.isdecimal() else wait)
            wait *= 2
    raise AssertionError("the last try returns or raises")


def _status(error: BaseException) -> tuple[int | None, Any]:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None), getattr(response, "headers", {})


def _kinds(error: BaseException) -> set[str]:
    """By the names of its classes, since the client changed its HTTP library between two of its versions."""
    classes = {kind.__name__ for kind in type(error).__mro__}
    found = {"TransportError": "transport", "OfflineModeIsEnabled": "offline", "GatedRepoError": "gated",
             "RepositoryNotFoundError": "repo", "RevisionNotFoundError": "revision", "EntryNotFoundError": "entry"}
    return {kind for name, kind in found.items() if name in classes}


@contextmanager
def hub_errors(where: object) -> Iterator[None]:
    """Turns what the official client raises into errors by name, without tokens and credentials."""
    try:
        yield
    except (AdapterpackError, KeyboardInterrupt, GeneratorExit):
        raise
    except Exception as error:
        raise _named(error, where) from None  # its own text may hold headers and addresses with credentials


_ERRORS: dict[str | int, tuple[type[HubError], str, str]] = {
    "offline": (HubOffline, "the network may not be used", "unset HF_HUB_OFFLINE, or use what was pulled before"),
    "gated": (GatedRepo, "the repository's owner asks for an agreement first",
              "accept it on the repository's page and log in (hf auth login, or HF_TOKEN)"),
    "revision": (RevisionNotFound, "the repository has no such revision", "name one of its branches, tags or commits"),
    "repo": (RepoNotFound, "there is no such repository, or it may not be seen with this token",
             "check the name and HF_ENDPOINT; for a private one log in (hf auth login, or HF_TOKEN)"),
    "entry": (HubError, "a file that the hub lists is not there", "try again later"),
    412: (HubConflict, "somebody else changed the repository meanwhile", "look at what changed, and push again"),
    401: (HubError, "the hub refuses the token, or asks for one", "log in with a token that may do this (hf auth login, or HF_TOKEN)"),
    403: (HubError, "the hub refuses the token, or asks for one", "log in with a token that may do this (hf auth login, or HF_TOKEN)"),
    "transport": (HubError, "the hub cannot be reached, or breaks off", "check the network and HF_ENDPOINT"),
}
"""What went wrong, by the client's class or the status, the first that fits: the error, its words, the way out."""


def _named(error: Exception, where: object) -> HubError:
    known = {*_kinds(error), _status(error)[0]}
    kind, what, remedy = next((told for mark, told in _ERRORS.items() if mark in known),
                              (HubError, "the hub does not answer as it should", ""))
    reason = None if kind is not HubError else redacted(f"{type(error).__name__}: {' '.join(str(error).split())}")[:300]
    return kind(what, where=where, found=reason, remedy=remedy or None)


def redacted(text: str) -> str:
    """The text without anything that looks like a token or a password, and without the token in use.

    Example:
        >>> redacted("Bearer abc at https://me:pw@host with hf_secretsecret")
        'Bearer [hidden] at https://[hidden]host with [hidden]'
    """
    text = _SECRET.sub("[hidden]", text)
    token = os.environ.get("HF_TOKEN")
    return text.replace(token, "[hidden]") if token else text
