"""Makes one commit on a hub: with the official client on the public hub, and with the same requests, but
within limits, on any other.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from ...errors import HubError
from . import names
from .client import Remote, api, hub_errors, with_retries
from .http import request_json
from .local_files import LocalFile
from .upload import send_large

_PUBLIC = "huggingface.co"
_BATCH = 256
_SAMPLE = 512
"""Bytes of a file's sample, by which a hub recognizes text."""
_MAX_REGULAR = 10 << 20
"""The most bytes of a file that is sent within the commit, and hence held in memory."""
_COMMIT_SECONDS = 600.0


class NewCommit(NamedTuple):
    """A new commit, and the URL of its pull request, if it has one."""

    oid: str
    pull_request: str | None = None


def commit(
    remote: Remote,
    files: Mapping[str, LocalFile],
    deleted: Iterable[str],
    message: str,
    description: str,
    pr: bool,
    progress: Callable[[int, int], None],
) -> NewCommit:
    """Writes and deletes files of the repository in one commit on the remote's branch, whose head must be the
    remote's commit.

    Large files are sent first. ``progress`` is called with (bytes done, bytes in all).

    Raises:
        HubConflict: the branch has another head meanwhile.
        HubError: the hub refuses.
    """
    make = _by_the_official_client if urlsplit(remote.endpoint).hostname == _PUBLIC else _by_requests
    with hub_errors(remote.reference):
        oid, pull_request = make(remote, files, deleted, message, description, pr, progress)
    if not isinstance(oid, str) or not names.COMMIT.fullmatch(oid):
        raise HubError(
            "the hub does not say which commit it made",
            where=remote.reference,
            expected="40 hex digits",
            found=str(oid)[:80],
        )
    return NewCommit(oid, None if pull_request is None else str(pull_request))


def _by_the_official_client(
    remote: Remote,
    files: Mapping[str, LocalFile],
    deleted: Iterable[str],
    message: str,
    description: str,
    pr: bool,
    progress: Callable[[int, int], None],
) -> tuple[Any, Any]:
    """Commits with the official client, because large files on the public hub go to its Xet service, which no
    other client speaks. The client shows its own progress.
    """
    # imported here, because only a push needs it
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete  # noqa: PLC0415

    operations = [
        *map(CommitOperationDelete, deleted),
        *(CommitOperationAdd(path, file.content) for path, file in files.items()),
    ]
    info = api(remote.token).create_commit(
        remote.repo,
        operations,
        revision=remote.reference.revision,
        create_pr=pr or None,
        parent_commit=remote.commit,
        commit_message=message,
        commit_description=description,
    )
    return info.oid, info.pr_url


def _by_requests(
    remote: Remote,
    files: Mapping[str, LocalFile],
    deleted: Iterable[str],
    message: str,
    description: str,
    pr: bool,
    progress: Callable[[int, int], None],
) -> tuple[Any, Any]:
    url, branch = f"{remote.endpoint}/api/models/{remote.repo}", quote(remote.reference.revision, safe="")
    query, total, done = "?create_pr=1" if pr else "", sum(file.size for file in files.values()), 0

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
    header = {"summary": message, "description": description, "parentCommit": remote.commit}
    lines = [
        {"key": "header", "value": header},
        *({"key": "deletedFile", "value": {"path": path}} for path in deleted),
        *(_operation(path, file, path in large) for path, file in files.items()),
    ]
    _, value = request_json(
        "POST",
        f"{url}/commit/{branch}{query}",
        remote.hub,
        remote,
        headers={"Content-Type": "application/x-ndjson"},
        content=b"\n".join(json.dumps(line).encode() for line in lines),
        seconds=_COMMIT_SECONDS,
    )
    return (value.get("commitOid"), value.get("pullRequestUrl")) if isinstance(value, dict) else (None, None)


def _large(remote: Remote, url: str, files: Mapping[str, LocalFile]) -> set[str]:
    """Returns the paths of the files that the hub wants as large files of git."""
    large, paths = set[str](), list(files)
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
        _, reply = with_retries(partial(request_json, "POST", url, remote.hub, remote, json=value))
        modes = reply.get("files") if isinstance(reply, dict) else None
        if not isinstance(modes, list) or not all(isinstance(mode, dict) for mode in modes):
            raise HubError(
                "the hub does not say how each file goes", where=remote, expected="a list of files"
            )
        large |= {str(mode.get("path")) for mode in modes if mode.get("uploadMode") == "lfs"}
    return large


def _operation(path: str, file: LocalFile, large: bool) -> dict[str, Any]:
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
