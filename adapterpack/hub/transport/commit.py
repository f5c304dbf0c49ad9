"""Makes one commit on a hub: with the official client on the public hub, and with the same requests, but
within limits, on any other. Large files are uploaded first by the git LFS protocol, complete or in numbered
parts; parts that the hub already has are skipped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from msgspec import Struct

from ...errors import HubError
from ...io import Json, Progress
from . import names
from .client import Remote, api, hub_errors, with_retries
from .http import ByteLimit, Endpoint, allowed_seconds, open_response, post_json, request_json
from .local_files import LocalFile

_PUBLIC = "huggingface.co"
_BATCH = 256
_SAMPLE = 512
"""Bytes of a file's sample, by which a hub recognizes text."""
_MAX_REGULAR = 10 << 20
"""The most bytes of a file that is sent within the commit, and hence held in memory."""
_COMMIT_SECONDS = 600.0
_LFS = {"Accept": "application/vnd.git-lfs+json", "Content-Type": "application/vnd.git-lfs+json"}
_LARGE_BATCH = 100
_MAX_ADDRESSES = 64 << 20
"""The most bytes of a response with the URLs of 100 files, each with up to a thousand signed ones."""
_MAX_PARTS = 10_000
"""The most parts of a file, the limit of S3 and similar stores."""
_JOIN_SECONDS = 600.0
"""The most seconds for a hub to join the parts of one file."""


class CommitReply(Struct, rename="camel"):
    """What a hub says of a new commit."""

    commit_oid: str
    pull_request_url: str | None = None


class UploadMode(Struct, rename="camel"):
    """How a hub wants a file to be sent: ``lfs`` as a git LFS object, anything else within the commit."""

    path: str
    upload_mode: str


class UploadModes(Struct):
    """How a hub wants some files."""

    files: list[UploadMode]


class NewCommit(NamedTuple):
    """A new commit, and the URL of its pull request, if it has one."""

    oid: str
    pull_request: str | None = None


class Draft(NamedTuple):
    """The files that a commit writes and deletes, by their paths in the repository, its message and
    description, and whether it opens a pull request.
    """

    files: Mapping[str, LocalFile]
    deleted: Sequence[str]
    message: str
    description: str
    pr: bool


def commit(remote: Remote, draft: Draft, progress: Progress) -> NewCommit:
    """Makes one commit on the remote's branch, whose head must be the remote's commit.

    Large files are sent first. ``progress`` is called with (bytes done, bytes in all).

    Raises:
        HubConflict: the branch has another head meanwhile.
        HubError: the hub refuses.
    """
    make = _by_the_official_client if urlsplit(remote.endpoint).hostname == _PUBLIC else _by_requests
    with hub_errors(remote.reference):
        oid, pull_request = make(remote, draft, progress)
    if not isinstance(oid, str) or not names.COMMIT.fullmatch(oid):
        raise HubError(
            "the hub does not say which commit it made",
            where=remote.reference,
            expected="40 hex digits",
            found=str(oid)[:80],
        )
    return NewCommit(oid, None if pull_request is None else str(pull_request))


def _by_the_official_client(remote: Remote, draft: Draft, progress: Progress) -> tuple[Any, Any]:
    """Commits with the official client, because large files on the public hub go to its Xet service, which no
    other client speaks. The client shows its own progress.
    """
    # imported here, because only a push needs it
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete  # noqa: PLC0415

    operations = [
        *map(CommitOperationDelete, draft.deleted),
        *(CommitOperationAdd(path, file.content) for path, file in draft.files.items()),
    ]
    info = api(remote.token).create_commit(
        remote.repo,
        operations,
        revision=remote.reference.revision,
        create_pr=draft.pr or None,
        parent_commit=remote.commit,
        commit_message=draft.message,
        commit_description=draft.description,
    )
    return info.oid, info.pr_url


def _by_requests(remote: Remote, draft: Draft, progress: Progress) -> tuple[Any, Any]:
    url = f"{remote.endpoint}/api/models/{remote.repo}"
    branch = quote(remote.reference.revision, safe="")
    query = "?create_pr=1" if draft.pr else ""
    files = draft.files
    total = sum(file.size for file in files.values())
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(done, total)

    large = _large(remote, f"{url}/preupload/{branch}{query}", files)
    if path := next((path for path in files if path not in large and files[path].size > _MAX_REGULAR), None):
        raise HubError(
            "the hub wants a large file within the commit",
            where=f"{remote}, {path}",
            expected=f"at most {_MAX_REGULAR} bytes",
            found=files[path].size,
        )
    send_large(remote.hub, remote.repo, [files[path] for path in files if path in large], count)
    header = {"summary": draft.message, "description": draft.description, "parentCommit": remote.commit}
    lines = [
        {"key": "header", "value": header},
        *({"key": "deletedFile", "value": {"path": path}} for path in draft.deleted),
        *(_operation(path, file, path in large) for path, file in files.items()),
    ]
    _, made = request_json(
        "POST",
        f"{url}/commit/{branch}{query}",
        remote.hub,
        remote,
        CommitReply,
        headers={"Content-Type": "application/x-ndjson"},
        content=b"\n".join(json.dumps(line).encode() for line in lines),
        seconds=_COMMIT_SECONDS,
    )
    return made.commit_oid, made.pull_request_url


def _large(remote: Remote, url: str, files: Mapping[str, LocalFile]) -> set[str]:
    """Returns the paths of the files that the hub wants as large files of git."""
    large = set()
    paths = list(files)
    for start in range(0, len(paths), _BATCH):
        value = {
            "files": [
                {
                    "path": path,
                    "size": files[path].size,
                    "sample": base64.b64encode(files[path].text(_SAMPLE)).decode(),
                }
                for path in paths[start : start + _BATCH]
            ]
        }
        ask = partial(request_json, "POST", url, remote.hub, remote, UploadModes, json=value)
        large |= {mode.path for mode in with_retries(ask)[1].files if mode.upload_mode == "lfs"}
    return large


def _operation(path: str, file: LocalFile, large: bool) -> Json:
    if large:
        return {
            "key": "lfsFile",
            "value": {"path": path, "algo": "sha256", "oid": file.sha256, "size": file.size},
        }
    return {
        "key": "file",
        "value": {
            "path": path,
            "encoding": "base64",
            "content": base64.b64encode(file.text(file.size)).decode(),
        },
    }


class Action(Struct):
    """A request that a client is to make. ``header`` has the size and the URLs of parts, if the hub takes a
    file in parts; ``held`` are the SHA-256 digests of parts that it has, by number.
    """

    href: str
    header: dict[str, str] | None = None
    held: dict[str, str] | None = None


class Actions(Struct):
    """The upload of a file that a hub lacks, and what it wants to be told afterwards."""

    upload: Action | None = None
    verify: Action | None = None


class UploadObject(Struct):
    """A large file by its SHA-256, with the hub's error if it refuses the file, else the requests to make."""

    oid: str
    error: Any = None
    actions: Actions | None = None


class UploadObjects(Struct):
    """The large files of a request."""

    objects: list[UploadObject]


def send_large(hub: Endpoint, repo: str, files: Iterable[LocalFile], progress: Callable[[int], None]) -> None:
    """Uploads the files that the hub lacks; ``progress`` is called with the bytes of each file or part that
    is done.

    They are sent without the token, to URLs that the hub supplied.

    Raises:
        HubError: the hub refuses, or does not return such URLs.
    """
    wanted = {file.sha256: file for file in files}
    with hub_errors(f"{repo}, large files"):
        for start in range(0, len(wanted), _LARGE_BATCH):
            some = list(wanted.values())[start : start + _LARGE_BATCH]
            for one in with_retries(partial(_addresses, hub, repo, some)):
                if one.oid in wanted:
                    _send(hub, wanted[one.oid], one.actions or Actions(), progress)


def _addresses(hub: Endpoint, repo: str, files: list[LocalFile]) -> list[UploadObject]:
    where = f"{repo}, large files"
    url = f"{hub.url}/{repo}.git/info/lfs/objects/batch"
    value = {
        "operation": "upload",
        "transfers": ["basic", "multipart"],
        "hash_algo": "sha256",
        "objects": [{"oid": file.sha256, "size": file.size} for file in files],
    }
    limit = ByteLimit(where, _MAX_ADDRESSES)
    _, reply = request_json("POST", url, hub, where, UploadObjects, limit, json=value, headers=_LFS)
    if failed := next((one.error for one in reply.objects if one.error), None):
        raise HubError("the hub does not take a large file", where=where, found=str(failed)[:200])
    return reply.objects


def _send(hub: Endpoint, file: LocalFile, actions: Actions, progress: Callable[[int], None]) -> None:
    upload, verify = actions.upload, actions.verify
    if upload is None:  # the hub has it already
        progress(file.size)
        return
    if "chunk_size" in (upload.header or {}):
        _send_parts(hub, file, upload, progress)
    else:
        with_retries(lambda: _put(hub, upload.href, file, 0, file.size))
        progress(file.size)
    if verify is not None:  # open_response sends the token only to the hub's own host
        with_retries(
            lambda: post_json(
                verify.href, hub, _name(file), {"oid": file.sha256, "size": file.size}, headers=_LFS
            )
        )


def _send_parts(hub: Endpoint, file: LocalFile, upload: Action, progress: Callable[[int], None]) -> None:
    header, received = upload.header or {}, upload.held or {}
    part_size = int(header["chunk_size"])
    addresses = [header[key] for key in sorted((key for key in header if key.isdecimal()), key=int)]
    if part_size <= 0 or len(addresses) != -(-file.size // part_size) or len(addresses) > _MAX_PARTS:
        raise HubError(
            "the hub does not say where each part of a file goes",
            where=_name(file),
            found=f"{len(addresses)} parts of {part_size}",
        )
    etags = []
    try:
        for number, address in enumerate(addresses):
            start = number * part_size
            length = min(part_size, file.size - number * part_size)
            etag = received.get(str(number + 1), "")
            same = re.fullmatch(r"[0-9a-f]{64}", etag) and etag == _sha256(file, start, length)
            etags.append(etag if same else _part(hub, address, file, start, length))
            progress(length)
    except KeyboardInterrupt as interrupt:
        if etags:
            interrupt.add_note(
                f"the hub may keep what it has of a file, {len(etags)} of {len(addresses)} parts, for "
                "the next push"
            )
        raise
    parts = [{"partNumber": number, "etag": etag} for number, etag in enumerate(etags, 1)]
    with_retries(
        lambda: post_json(
            upload.href,
            hub.anonymous,
            _name(file),
            {"oid": file.sha256, "parts": parts},
            headers=_LFS,
            seconds=_JOIN_SECONDS,
        )
    )


def _part(hub: Endpoint, address: str, file: LocalFile, start: int, length: int) -> str:
    etag = str(with_retries(lambda: _put(hub, address, file, start, length)).get("ETag", ""))
    if not etag:
        raise HubError("the hub does not confirm a part of a file", where=_name(file), expected="an ETag")
    return etag


def _put(hub: Endpoint, address: str, file: LocalFile, start: int, length: int) -> Any:
    """Uploads bytes of a file and returns the headers of the response."""
    with open_response(
        "PUT",
        address,
        hub.anonymous,
        _name(file),
        headers={"Content-Length": str(length)},
        content=file.part(start, length),
        seconds=allowed_seconds(length),
    ) as response:
        return response.headers


def _name(file: LocalFile) -> str:
    return f"the file of sha256 {file.sha256}"


def _sha256(file: LocalFile, start: int, length: int) -> str:
    hasher = hashlib.sha256()
    for chunk in file.part(start, length):
        hasher.update(chunk)
    return hasher.hexdigest()
