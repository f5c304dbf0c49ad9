"""Large files to a hub in numbered parts: those that are there already, sent by a try that broke off, are not sent again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from ...errors import HubError
from ..local_files import Local
from .client import again, endpoint, hub_errors

LARGE = 8 << 20
"""Bytes from which a file is asked about here; smaller ones go as the official client sends them."""
_LFS = {"Accept": "application/vnd.git-lfs+json", "Content-Type": "application/vnd.git-lfs+json"}
_MOST = 100
_DONE_WITHIN = 600.0
"""Seconds for a hub to put the parts of one file together."""


def send_large(repo: str, files: Iterable[Local], token: str | None, progress: Callable[[int], None]) -> None:
    """Uploads those large files that the hub wants in parts and does not have; ``progress`` is told the bytes of each part that is there.

    Files that it has, or wants in one piece, are left to the commit. Parts go out without the token, to addresses that the hub gave.

    Raises:
        HubError: the hub refuses, or answers what is no such address.
    """
    wanted = {file.sha256: file for file in files if file.size >= LARGE}
    with hub_errors(f"{repo}, large files"):
        for start in range(0, len(wanted), _MOST):
            some = list(wanted.values())[start : start + _MOST]
            for told in again(lambda some=some: _asked(repo, some, token)):  # type: ignore[misc]
                action = (told.get("actions") or {}).get("upload") or {}
                if told.get("oid") in wanted and "chunk_size" in (action.get("header") or {}):
                    _send(wanted[told["oid"]], action, progress)


def _asked(repo: str, files: list[Local], token: str | None) -> list[dict[str, Any]]:
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # noqa: PLC0415 - only a named hub pays for it

    value = {"operation": "upload", "transfers": ["basic", "multipart"], "hash_algo": "sha256",
             "objects": [{"oid": file.sha256, "size": file.size} for file in files]}
    response = get_session().post(f"{endpoint()}/{repo}.git/info/lfs/objects/batch", json=value,
                                  headers={**build_hf_headers(token=token), **_LFS})
    hf_raise_for_status(response)
    found: list[dict[str, Any]] = response.json()["objects"]
    return found


def _send(file: Local, action: dict[str, Any], progress: Callable[[int], None]) -> None:
    header, held = action["header"], action.get("held") or {}
    each = int(header["chunk_size"])
    addresses = [header[key] for key in sorted((key for key in header if key.isdecimal()), key=int)]
    if each <= 0 or len(addresses) != -(-file.size // each):
        raise HubError("the hub does not say where each part of a file goes", where=file.content, found=f"{len(addresses)} parts of {each}")
    etags: list[str] = []
    try:
        for number, address in enumerate(addresses):
            start, length = number * each, min(each, file.size - number * each)
            there = str(held.get(str(number + 1)))
            same = re.fullmatch(r"[0-9a-f]{64}", there) and there == _sha256(file, start, length)
            etags.append(there if same else again(lambda where=address, at=start, size=length: _put(where, file, at, size)))  # type: ignore[misc]
            progress(length)
    except KeyboardInterrupt as interrupt:
        if etags:
            interrupt.add_note(f"the hub may keep what it has of a file, {len(etags)} of {len(addresses)} parts, for the next push")
        raise
    parts = [{"partNumber": number, "etag": etag} for number, etag in enumerate(etags, 1)]
    again(lambda: _request("POST", action["href"], json={"oid": file.sha256, "parts": parts}, headers=_LFS, timeout=_DONE_WITHIN))


def _put(address: str, file: Local, start: int, length: int) -> str:
    response = _request("PUT", address, content=file.part(start, length), headers={"Content-Length": str(length)})
    etag = response.headers.get("ETag", "")
    if not etag:
        raise HubError("the hub does not confirm a part of a file", where=file.content, expected="an ETag")
    return str(etag)


def _request(method: str, address: str, **options: Any) -> Any:
    from huggingface_hub.utils import get_session, hf_raise_for_status  # noqa: PLC0415

    own, there = urlsplit(endpoint()), urlsplit(address)
    if there[:2] != own[:2] and there.scheme != "https":
        raise HubError("the hub sends its clients to an address that is neither its own nor https", found=there.hostname,
                       remedy="do not use this hub")
    response = get_session().request(method, address, follow_redirects=False, **options)
    hf_raise_for_status(response)
    return response


def _sha256(file: Local, start: int, length: int) -> str:
    hasher = hashlib.sha256()
    for chunk in file.part(start, length):
        hasher.update(chunk)
    return hasher.hexdigest()
