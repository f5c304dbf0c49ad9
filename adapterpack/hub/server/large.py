"""Receives large files by the git LFS protocol: hands out upload URLs, receives files or parts, and joins
parts.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ...http.bodies import chunks_of
from ...http.http_error import HTTPError
from .bodies import json_of
from .parts import UploadedParts, part_sizes
from .reading import origin_of, storage_of
from .storage import SPARE

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_OBJECT = 1 << 40
_MAX_OBJECTS = 1000


async def batch(request: Request) -> Response:
    """Returns the upload URLs of large files; files that are present need none. ``held`` lists parts that are
    present already.
    """
    value, storage = await json_of(request), storage_of(request)
    wanted, transfers = value.get("objects") or [], value.get("transfers") or []
    if not isinstance(transfers, list):
        raise HTTPError(400, "BadRequest", "transfers is a list")
    if (
        not isinstance(wanted, list)
        or len(wanted) > _MAX_OBJECTS
        or not all(isinstance(one, dict) for one in wanted)
    ):
        raise HTTPError(400, "BadRequest", f"objects is a list of at most {_MAX_OBJECTS}")
    answer: list[dict[str, Any]] = []
    for one in wanted:
        sha256, size = str(one.get("oid")), one.get("size")
        if not _SHA256.fullmatch(sha256) or type(size) is not int or not 0 <= size <= _MAX_OBJECT:
            raise HTTPError(400, "BadRequest", "an object has a sha256 and a size")
        stored = await run_in_threadpool(storage.renew, sha256)
        upload = (
            {}
            if stored
            else {"upload": await run_in_threadpool(_action, request, sha256, size, "multipart" in transfers)}
        )
        action = {"actions": upload} if upload else {}
        answer.append({"oid": sha256, "size": size, **action})
    return JSONResponse({"transfer": "basic", "objects": answer}, media_type="application/vnd.git-lfs+json")


def _action(request: Request, sha256: str, size: int, in_parts: bool) -> dict[str, Any]:
    access, place = request.app.state.access, f"{origin_of(request)}/lfs/{sha256}"
    sizes = part_sizes(size, request.app.state.part) if in_parts else None
    if sizes is None:
        return {"href": f"{place}?{access.sign(sha256, size)}"}
    addresses = {
        str(number): f"{place}/{number}?{access.sign(f'{sha256}/{number}', sizes.length(number))}"
        for number in range(1, sizes.parts + 1)
    }
    received = {str(number): etag for number, etag in _parts(request).list_received(sha256).items()}
    header = {"chunk_size": str(sizes.part_size), **addresses}
    return {"href": f"{place}?{access.sign(f'{sha256}/all', size)}", "header": header, "held": received}


async def upload(request: Request) -> Response:
    """Receives a large file at a URL that was signed for exactly these bytes."""
    sha256 = request.path_params["sha256"]
    size = _require_signed(request, sha256)
    storage = storage_of(request)
    with storage.incoming() as path:
        if await _receive(request, path, size) != sha256:
            raise HTTPError(400, "BadRequest", "These are not the announced bytes")
        await run_in_threadpool(storage.adopt, path, sha256)
    return Response()


async def upload_part(request: Request) -> Response:
    """Receives one part of a large file and returns its SHA-256 as ETag."""
    sha256, number = request.path_params["sha256"], request.path_params["number"]
    size = _require_signed(request, f"{sha256}/{number}")  # the signature proves that it is a number
    with storage_of(request).incoming() as path:
        etag = await _receive(request, path, size)
        await run_in_threadpool(_parts(request).keep, sha256, int(number), path, etag)
    return Response(headers={"ETag": f'"{etag}"'})


async def complete(request: Request) -> Response:
    """Joins the parts of a large file."""
    sha256 = request.path_params["sha256"]
    size = _require_signed(request, f"{sha256}/all")
    parts = (await json_of(request)).get("parts")
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise HTTPError(400, "BadRequest", "parts is a list")
    etags = [str(part.get("etag")).strip('"') for part in parts]
    if [part.get("partNumber") for part in parts] != list(range(1, len(parts) + 1)) or not all(
        map(_SHA256.fullmatch, etags)
    ):
        raise HTTPError(400, "BadRequest", "parts are numbered from 1, and have an etag")
    if not await run_in_threadpool(storage_of(request).renew, sha256):
        await run_in_threadpool(_parts(request).join, sha256, size, etags)
    return JSONResponse({"success": True})


async def _receive(request: Request, path: Path, size: int) -> str:
    """Writes exactly ``size`` bytes of the body to ``path`` and returns their SHA-256."""
    count, hasher = 0, hashlib.sha256()
    if size + SPARE > storage_of(request).free():
        raise HTTPError(507, "NoSpace", "The hub's disk is full")
    with path.open("wb") as file:
        async for chunk in chunks_of(request):
            count += len(chunk)
            if count > size:
                break
            await run_in_threadpool(_take, chunk, hasher, file)
    if count != size:
        raise HTTPError(400, "BadRequest", "These are not the announced bytes")
    return hasher.hexdigest()


def _take(chunk: bytes, hasher: Any, file: Any) -> None:
    hasher.update(chunk)
    file.write(chunk)


def _require_signed(request: Request, what: str) -> int:
    query = request.query_params
    size: int = request.app.state.access.require_signed(
        what, *(query.get(key, "") for key in ("size", "until", "signature"))
    )
    return size


def _parts(request: Request) -> UploadedParts:
    parts: UploadedParts = request.app.state.parts
    return parts
