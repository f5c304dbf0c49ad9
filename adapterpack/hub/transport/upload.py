"""Uploads large files by the git LFS protocol, complete or in numbered parts; skips parts that the hub
already has.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from ...errors import HubError
from .client import hub_errors, with_retries
from .http import ByteLimit, Endpoint, allowed_seconds, open_response, post_json, request_json
from .local_files import LocalFile

_LFS = {"Accept": "application/vnd.git-lfs+json", "Content-Type": "application/vnd.git-lfs+json"}
_BATCH = 100
_MAX_ADDRESSES = 64 << 20
"""The most bytes of a response with the URLs of 100 files, each with up to a thousand signed ones."""
_MAX_PARTS = 10_000
"""The most parts of a file, the limit of S3 and similar stores."""
_JOIN_SECONDS = 600.0
"""The most seconds for a hub to join the parts of one file."""


def send_large(hub: Endpoint, repo: str, files: Iterable[LocalFile], progress: Callable[[int], None]) -> None:
    """Uploads the files that the hub lacks; ``progress`` is called with the bytes of each file or part that
    is done.

    They are sent without the token, to URLs that the hub supplied.

    Raises:
        HubError: the hub refuses, or does not return such URLs.
    """
    wanted = {file.sha256: file for file in files}
    with hub_errors(f"{repo}, large files"):
        for start in range(0, len(wanted), _BATCH):
            some = list(wanted.values())[start : start + _BATCH]
            addresses = with_retries(partial(_addresses, hub, repo, some))
            objects = {str(one.get("oid")): one for one in addresses}
            for file in some:
                if file.sha256 in objects:
                    _send(hub, file, objects[file.sha256].get("actions") or {}, progress)


def _addresses(hub: Endpoint, repo: str, files: list[LocalFile]) -> list[dict[str, Any]]:
    where, url = f"{repo}, large files", f"{hub.url}/{repo}.git/info/lfs/objects/batch"
    value = {
        "operation": "upload",
        "transfers": ["basic", "multipart"],
        "hash_algo": "sha256",
        "objects": [{"oid": file.sha256, "size": file.size} for file in files],
    }
    _, reply = request_json(
        "POST", url, hub, where, ByteLimit(where, _MAX_ADDRESSES), json=value, headers=_LFS
    )
    objects = reply.get("objects") if isinstance(reply, dict) else None
    if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
        raise HubError("the hub does not say where large files go", where=where, expected="a list of objects")
    if failed := next((one["error"] for one in objects if one.get("error")), None):
        raise HubError("the hub does not take a large file", where=where, found=str(failed)[:200])
    return objects


def _send(hub: Endpoint, file: LocalFile, actions: dict[str, Any], progress: Callable[[int], None]) -> None:
    upload, verify = actions.get("upload"), actions.get("verify")
    if upload is None:  # the hub has it already
        progress(file.size)
        return
    header = upload.get("header") or {}
    if "chunk_size" in header:
        _send_parts(hub, file, upload["href"], header, upload.get("held") or {}, progress)
    else:
        with_retries(lambda: _put(hub, upload["href"], file, 0, file.size))
        progress(file.size)
    if verify is not None:  # open_response sends the token only to the hub's own host
        with_retries(
            lambda: post_json(
                verify["href"], hub, _name(file), {"oid": file.sha256, "size": file.size}, headers=_LFS
            )
        )


def _send_parts(
    hub: Endpoint,
    file: LocalFile,
    href: str,
    header: dict[str, Any],
    received: dict[str, Any],
    progress: Callable[[int], None],
) -> None:
    part_size = int(header["chunk_size"])
    addresses = [header[key] for key in sorted((key for key in header if key.isdecimal()), key=int)]
    if part_size <= 0 or len(addresses) != -(-file.size // part_size) or len(addresses) > _MAX_PARTS:
        raise HubError(
            "the hub does not say where each part of a file goes",
            where=_name(file),
            found=f"{len(addresses)} parts of {part_size}",
        )
    etags: list[str] = []
    try:
        for number, address in enumerate(addresses):
            start, length = number * part_size, min(part_size, file.size - number * part_size)
            etag = str(received.get(str(number + 1)))
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
            href,
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
