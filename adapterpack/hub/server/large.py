"""Receives large files by the git LFS protocol: hands out upload URLs, receives files or parts, and joins
parts.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from ...http import HTTPError, bad_request, chunks_of
from ...io import Json
from .parts import part_size
from .requests import HubRequest
from .storage import SPARE
from .writing import Sha256

_OTHER_BYTES = "These are not the announced bytes"


class LargeObject(Struct):
    """A large file that a client wants to upload."""

    oid: Sha256
    size: Annotated[int, Meta(ge=0, le=1 << 40)]


class Batch(Struct):
    """The large files that a client wants to upload, and the ways that it knows."""

    objects: Annotated[list[LargeObject], Meta(max_length=1000)] = []
    transfers: list[str] = []


class SentPart(Struct, rename={"number": "partNumber"}):
    """A part that was uploaded."""

    number: int
    etag: Annotated[str, Meta(pattern=r'^"?[0-9a-f]{64}"?\Z')]


class SentParts(Struct):
    """All parts of a large file."""

    parts: list[SentPart]


def batch(asked: HubRequest) -> Response:
    """Returns the upload URLs of large files; files that are present need none. ``held`` lists parts that are
    present already.
    """
    wanted = asked.json(Batch)
    answer = []
    for one in wanted.objects:
        stored = asked.storage.renew(one.oid)
        upload = None if stored else _action(asked, one, "multipart" in wanted.transfers)
        actions = {} if upload is None else {"actions": {"upload": upload}}
        answer.append({"oid": one.oid, "size": one.size, **actions})
    return JSONResponse({"transfer": "basic", "objects": answer}, media_type="application/vnd.git-lfs+json")


def _action(asked: HubRequest, wanted: LargeObject, in_parts: bool) -> Json:
    access = asked.hub.access
    sha256 = wanted.oid
    size = wanted.size
    place = f"{asked.origin}/lfs/{sha256}"
    step = part_size(size, asked.hub.part) if in_parts else None
    if step is None:
        return {"href": f"{place}?{access.sign(sha256, size)}"}
    addresses = {
        str(number): f"{place}/{number}?{access.sign(f'{sha256}/{number}', min(step, size - start))}"
        for number, start in enumerate(range(0, size, step), 1)
    }
    received = {str(number): etag for number, etag in asked.hub.parts.list_received(sha256).items()}
    header = {"chunk_size": str(step), **addresses}
    return {"href": f"{place}?{access.sign(f'{sha256}/all', size)}", "header": header, "held": received}


async def upload(asked: HubRequest) -> Response:
    """Receives a large file at a URL that was signed for exactly these bytes."""
    sha256 = asked.request.path_params["sha256"]
    with asked.storage.incoming() as path:
        if await _receive(asked, sha256, path) != sha256:
            raise bad_request(_OTHER_BYTES)
        await run_in_threadpool(asked.storage.adopt, path, sha256)
    return Response()


async def upload_part(asked: HubRequest) -> Response:
    """Receives one part of a large file and returns its SHA-256 as ETag."""
    sha256 = asked.request.path_params["sha256"]
    number = asked.request.path_params["number"]
    with asked.storage.incoming() as path:
        etag = await _receive(asked, f"{sha256}/{number}", path)
        # the signature has proved that it is a number
        await run_in_threadpool(asked.hub.parts.keep, sha256, int(number), path, etag)
    return Response(headers={"ETag": f'"{etag}"'})


def complete(asked: HubRequest) -> Response:
    """Joins the parts of a large file."""
    sha256 = asked.request.path_params["sha256"]
    size = asked.hub.access.require_signed(f"{sha256}/all", asked.request.query_params)
    parts = asked.json(SentParts).parts
    if [part.number for part in parts] != list(range(1, len(parts) + 1)):
        raise bad_request("parts are numbered from 1")
    if not asked.storage.renew(sha256):
        asked.hub.parts.join(sha256, size, [part.etag.strip('"') for part in parts])
    return JSONResponse({"success": True})


async def _receive(asked: HubRequest, signed: str, path: Path) -> str:
    """Writes the body to ``path`` and returns its SHA-256. It has as many bytes as the URL is ``signed``
    for.
    """
    size = asked.hub.access.require_signed(signed, asked.request.query_params)
    if size + SPARE > asked.storage.free():
        raise HTTPError(507, "NoSpace", "The hub's disk is full")
    count = 0
    hasher = hashlib.sha256()
    with path.open("wb") as file:

        def take(chunk: bytes) -> None:
            hasher.update(chunk)
            file.write(chunk)

        async for chunk in chunks_of(asked.request):
            count += len(chunk)
            if count > size:
                break
            await run_in_threadpool(take, chunk)
    if count != size:
        raise bad_request(_OTHER_BYTES)
    return hasher.hexdigest()
