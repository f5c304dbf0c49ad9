"""Resolves a reference to a commit, lists its files, and converts errors of hubs and of the official client
to typed ones.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, singledispatch
from typing import Any, Literal, TypeVar
from urllib.parse import quote, urljoin, urlsplit

from msgspec import Struct

from ...errors import (
    AdapterpackError,
    FormatError,
    GatedRepo,
    HubConflict,
    HubError,
    HubOffline,
    RepoNotFound,
    RevisionNotFound,
)
from . import names
from .http import (
    MAX_ANSWER,
    ByteLimit,
    Endpoint,
    ErrorResponse,
    open_response,
    request_json,
    same_origin,
    too_slow,
)

_T = TypeVar("_T")
MAX_LISTED = 20_000
_TRIES = 4
_FIRST_WAIT = 0.25
_LONGEST_WAIT = 60.0
_LISTING_SECONDS = 600.0
"""The most seconds for all pages of a listing together."""
MAX_PAGES = 400
"""The most pages of a listing. The public hub sends at most a thousand entries a page, and at least fifty."""
_SECRET = re.compile(r"hf_[A-Za-z0-9]{6,}|(?<=://)[^/\s@]+@|(?<=[Bb]earer )\S+")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_RETRIED = frozenset({429, 500, 502, 503, 504})


class RepoInfo(Struct):
    """What a hub says of a revision of a repository."""

    id: str
    sha: str


class LargeEntry(Struct):
    """The SHA-256 and the size of a large file."""

    oid: str
    size: int


class ListedEntry(Struct):
    """One entry of a listing as a hub sends it."""

    type: Literal["file", "directory"]
    path: str
    size: int = -1
    oid: str = ""
    lfs: LargeEntry | None = None


@dataclass(frozen=True)
class ListedFile:
    """One file of a listing: its path, its size in bytes, and its SHA-256 (large files) or git blob id, as
    hex.
    """

    path: str
    size: int
    sha256: str | None
    git: str | None


@dataclass(frozen=True)
class Remote:
    """A reference at a resolved commit. ``token`` is the caller's, or None for the user's own."""

    reference: names.HubReference
    commit: str
    endpoint: str
    token: str | None = field(default=None, repr=False)

    @property
    def repo(self) -> str:
        """The repository, OWNER/NAME."""
        return self.reference.repo

    @property
    def hub(self) -> Endpoint:
        """The URL of the hub, and the token for it."""
        return Endpoint(self.endpoint, self.token)

    @property
    def pinned(self) -> names.HubReference:
        """The reference with the commit as its revision."""
        return self.reference.at(self.commit)

    @property
    def whole_repo(self) -> Remote:
        """The same commit without the reference's folder."""
        return replace(self, reference=self.reference._replace(folder=""))

    def path(self, name: str) -> str:
        """Returns the path in the repository of a file in the reference's folder."""
        return f"{self.reference.prefix}{name}"

    @contextmanager
    def open(self, path: str, headers: Mapping[str, str]) -> Iterator[Any]:
        """Opens the response with the bytes of a file at this commit.

        Raises:
            HubError: the hub does not say that they are of this commit.
        """
        from huggingface_hub import constants  # noqa: PLC0415 - only a named hub pays for it

        where = f"{self}, {path}"
        pause = constants.HF_HUB_DOWNLOAD_TIMEOUT

        def require_commit(response: Any) -> None:
            commit = response.headers.get("X-Repo-Commit", "no X-Repo-Commit")
            if response.status_code < 400 and commit != self.commit:
                raise HubError(
                    "the hub does not say that these bytes are of the commit that was asked for",
                    where=where,
                    expected=self.commit,
                    found=commit[:80],
                )

        url = f"{self.endpoint}/{self.repo}/resolve/{self.commit}/{quote(self.path(path))}"
        with open_response(
            "GET", url, self.hub, where, headers=headers, pause=pause, check=require_commit
        ) as response:
            yield response

    def __str__(self) -> str:
        return str(self.pinned)


def endpoint() -> str:
    """Returns the URL of the hub: ``HF_ENDPOINT``, or the public one."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def offline() -> bool:
    """Returns whether ``HF_HUB_OFFLINE`` forbids the network."""
    from huggingface_hub import constants  # noqa: PLC0415 - only a named hub pays for it

    return bool(constants.HF_HUB_OFFLINE)


def api(token: str | None = None) -> Any:
    """Makes the official client of the hub."""
    from huggingface_hub import HfApi  # noqa: PLC0415

    return HfApi(endpoint=endpoint(), token=token)


@singledispatch
def connect(reference: names.HubReference, token: str | None = None) -> Remote:
    """Resolves the revision of a reference to a commit.

    Raises:
        RepoNotFound, GatedRepo, RevisionNotFound: the hub refuses for this reason.
        HubError: any other failure of the hub.
    """
    hub = Endpoint(endpoint(), token)
    url = f"{hub.url}/api/models/{reference.repo}/revision/{quote(reference.revision, safe='')}"
    with hub_errors(reference):
        _, info = with_retries(lambda: request_json("GET", url, hub, reference, RepoInfo))
    commit, repo = info.sha, info.id
    if not names.COMMIT.fullmatch(commit):
        raise HubError(
            "the hub does not say which commit this is",
            where=reference,
            expected="40 hex digits",
            found=commit[:80],
        )
    if names.COMMIT.fullmatch(reference.revision) and commit != reference.revision:
        raise HubError(
            "the hub answers with another commit than was asked for", where=reference, found=commit
        )
    if repo.casefold() != reference.repo.casefold():
        raise HubError(
            "the repository has moved, and its old name may belong to somebody else by now",
            where=reference,
            found=repo[:200],
            remedy=f"if that is the one you mean, name {repo[:200]}",
        )
    return Remote(reference, commit, hub.url, token)


@singledispatch
def tree(remote: Remote) -> dict[str, ListedFile]:
    """Lists every file of the commit in the reference's folder, by its path there. Every path is checked to
    be safe as a local file.

    A missing folder yields nothing, since git has no empty folders.

    Raises:
        FormatError: there are too many files, a path leads out of its folder, or an entry is incomplete.
        HubError: the hub's response is not valid.
    """
    folder, prefix = remote.reference.folder, remote.reference.prefix
    with hub_errors(remote):
        try:
            entries = list(_entries(remote))
        except ErrorResponse as error:
            if not folder or error.kind != "entry":
                raise
            entries = []
    files = [entry for entry in entries if entry.type == "file"]
    names.require_safe([entry.path for entry in files], remote)
    listed = {}
    for entry in files:
        path = entry.path
        size = entry.size
        lfs = entry.lfs
        if not path.startswith(prefix):
            raise FormatError(
                "the hub lists a file of another folder than was asked for", where=remote, found=path[:80]
            )
        sha256, git = (None, entry.oid) if lfs is None else (lfs.oid, None)
        if size < 0 or (lfs and lfs.size != size) or not _DIGEST.fullmatch(sha256 or git or ""):
            raise FormatError("the hub lists a file without its size and digest", where=f"{remote}, {path}")
        name = path.removeprefix(prefix)
        listed[name] = ListedFile(name, size, sha256, git)
    return listed


def _entries(remote: Remote) -> Iterator[ListedEntry]:
    """Yields the entries of a listing, page by page. Checks that all pages come from the hub itself, that
    only the last is empty, and that they arrive in time.
    """
    folder = f"/{quote(remote.reference.folder, safe='')}" if remote.reference.folder else ""
    url = (
        f"{remote.endpoint}/api/models/{remote.repo}/tree/{remote.commit}{folder}?recursive=true&expand=false"
    )
    limit = ByteLimit(remote, MAX_ANSWER)
    started = time.monotonic()
    count = 0
    for _ in range(MAX_PAGES):
        ask = partial(request_json, "GET", url, remote.hub, remote, list[ListedEntry], limit)
        response, page = with_retries(ask)
        yield from page
        count += len(page)
        if count > MAX_LISTED:
            raise FormatError(
                "the repository lists too many files", where=remote, expected=f"at most {MAX_LISTED}"
            )
        following = response.links.get("next", {}).get("url")
        if following is None:
            return
        url = urljoin(url, following)
        if not same_origin(url, remote.endpoint):
            raise HubError(
                "the hub's listing goes on at another host",
                where=remote,
                found=urlsplit(url).hostname,
                remedy="do not use this hub",
            )
        if not page:
            raise HubError(
                "the hub's listing has no end: a page is empty, and not the last",
                where=remote,
                remedy="do not use this hub",
            )
        if time.monotonic() - started > _LISTING_SECONDS:
            raise too_slow(remote, f"{count} files in {_LISTING_SECONDS:.0f} s")
    raise HubError(
        "the hub's listing has no end",
        where=remote,
        expected=f"at most {MAX_PAGES} pages",
        found=f"{count} files on them",
        remedy="do not use this hub",
    )


def in_folder(listed: Mapping[str, ListedFile], prefix: str) -> dict[str, ListedFile]:
    """Selects the files of a complete repository that are in a folder, in the form in which :func:`tree`
    lists that folder.
    """
    inside = {path.removeprefix(prefix): one for path, one in listed.items() if path.startswith(prefix)}
    return {path: replace(one, path=path) for path, one in inside.items()}


def with_retries(request: Callable[[], _T]) -> _T:
    """Calls ``request`` up to four times while the hub is busy, fails or disconnects. It waits as long as the
    hub asks, but at most a minute.
    """
    wait = _FIRST_WAIT
    for tries in range(_TRIES):
        try:
            return request()
        except AdapterpackError:
            raise
        except Exception as error:
            status, headers = _status(error)
            passing = status in _RETRIED if status else "transport" in _kinds(error)
            if not passing or tries == _TRIES - 1:
                raise
            seconds = headers.get("Retry-After", "")
            time.sleep(min(float(seconds), _LONGEST_WAIT) if seconds.isdecimal() else wait)
            wait *= 2
    raise AssertionError("the last try returns or raises")


def _status(error: BaseException) -> tuple[int | None, Any]:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None), getattr(response, "headers", {})


def _kinds(error: BaseException) -> set[str]:
    """Classifies an error by the names of its classes, because the official client has changed its HTTP
    library between versions.
    """
    if isinstance(error, ErrorResponse):
        return set() if error.kind is None else {error.kind}
    classes = {kind.__name__ for kind in type(error).__mro__}
    kinds = {
        "TransportError": "transport",
        "OfflineModeIsEnabled": "offline",
        "GatedRepoError": "gated",
        "RepositoryNotFoundError": "repo",
        "RevisionNotFoundError": "revision",
        "EntryNotFoundError": "entry",
    }
    return {kind for name, kind in kinds.items() if name in classes}


@contextmanager
def hub_errors(where: object) -> Iterator[None]:
    """Converts exceptions of the official client to typed errors, without tokens and credentials."""
    try:
        yield
    except (AdapterpackError, KeyboardInterrupt, GeneratorExit):
        raise
    except Exception as error:
        # the original text may contain headers and URLs with credentials
        raise _hub_error(error, where) from None


_ERRORS: dict[str | int, tuple[type[HubError], str, str]] = {
    "offline": (
        HubOffline,
        "the network may not be used",
        "unset HF_HUB_OFFLINE, or use what was pulled before",
    ),
    "gated": (
        GatedRepo,
        "the repository's owner asks for an agreement first",
        "accept it on the repository's page and log in (hf auth login, or HF_TOKEN)",
    ),
    "revision": (
        RevisionNotFound,
        "the repository has no such revision",
        "name one of its branches, tags or commits",
    ),
    "repo": (
        RepoNotFound,
        "there is no such repository, or it may not be seen with this token",
        "check the name and HF_ENDPOINT; for a private one log in (hf auth login, or HF_TOKEN)",
    ),
    "entry": (HubError, "a file that the hub lists is not there", "try again later"),
    412: (
        HubConflict,
        "somebody else changed the repository meanwhile",
        "look at what changed, and push again",
    ),
    **dict.fromkeys(
        (401, 403),
        (
            HubError,
            "the hub refuses the token, or asks for one",
            "log in with a token that may do this (hf auth login, or HF_TOKEN)",
        ),
    ),
    507: (HubError, "the disk of the hub is full", "free some space on the hub, and push again"),
    "transport": (
        HubError,
        "the hub cannot be reached, or breaks off",
        "check the network and the address (HF_ENDPOINT)",
    ),
}
"""The kind or status of an error -> its class, message and remedy. The first match counts."""


def _hub_error(error: Exception, where: object) -> HubError:
    marks = {*_kinds(error), _status(error)[0]}
    kind, what, remedy = next(
        (named for mark, named in _ERRORS.items() if mark in marks),
        (HubError, "the hub does not answer as it should", ""),
    )
    reason = (
        None
        if kind is not HubError
        else redact(f"{type(error).__name__}: {' '.join(str(error).split())}")[:300]
    )
    return kind(what, where=where, found=reason, remedy=remedy or None)


def redact(text: str) -> str:
    """Returns the text without anything that looks like a token or a password, and without the token in use.

    Example:
        >>> redact("Bearer abc at https://me:pw@host with hf_secretsecret")
        'Bearer [hidden] at https://[hidden]host with [hidden]'
    """
    text = _SECRET.sub("[hidden]", text)
    token = os.environ.get("HF_TOKEN")
    return text.replace(token, "[hidden]") if token else text
