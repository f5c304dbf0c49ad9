"""What changes a hub: repositories, uploads, commits, tags. Each asks for a token that may write."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ...errors import FormatError
from ...pack import strict_json
from .. import names
from .reading import repo_of, revision_of, storage_of
from .storage import Entry, Refused

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGE = frozenset({".safetensors", ".onnx", ".onnx_adapter", ".data", ".bin", ".model", ".gguf"})
_MAX_REGULAR = 10 << 20
_MAX_BODY = 64 << 20
_MAX_OBJECT = 1 << 40
_SPARE = 64 << 20
"""Bytes of the disk that an upload leaves free."""


async def create(request: Request) -> Response:
    """A new repository; one that is there already is told with its address."""
    name, value = _require_writer(request), _object(await _body(request))
    repo = f"{value.get('organization') or name}/{value.get('name')}"
    address = {"url": f"{_origin(request)}/{repo}", "id": repo}
    if value.get("type") not in {None, "model"}:
        raise Refused(400, "BadRequest", "This hub keeps models only")
    private = value.get("visibility") == "private" or value.get("private") is True
    try:
        await run_in_threadpool(storage_of(request).create, repo, private=private, author=name)
    except Refused as refused:
        if refused.status != 409:
            raise
        return JSONResponse({"error": refused.what, **address}, 409, {"X-Error-Code": "Conflict", "X-Error-Message": refused.what})
    return JSONResponse(address)


async def validate_yaml(request: Request) -> Response:
    """Whether the header of a README is YAML."""
    import yaml  # noqa: PLC0415 - asked for by few

    text = str(_object(await _body(request)).get("content", ""))
    errors = []
    if text.startswith("---\n"):
        try:
            if not isinstance(yaml.safe_load(text[4:].partition("\n---")[0]), dict):
                errors = [{"message": "the header is no mapping"}]
        except yaml.YAMLError:
            errors = [{"message": "the header is not YAML"}]
    return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)


async def preupload(request: Request) -> Response:
    """How each file is to be sent: in the commit, or apart as a large one; files that are there already are told by their id."""
    _require_writer(request)
    repo, storage, wanted = repo_of(request), storage_of(request), _object(await _body(request)).get("files")
    held = (await run_in_threadpool(lambda: storage.commit(repo, storage.resolve(repo, revision_of(request))))).files
    if not isinstance(wanted, list) or not all(isinstance(file, dict) for file in wanted):
        raise Refused(400, "BadRequest", "files is a list")
    answer = []
    for file in wanted:
        path, size = str(file.get("path")), file.get("size")
        if not isinstance(size, int) or names.unsafe(path):
            raise Refused(400, "BadRequest", "a file has a path and a size")
        sample = _decoded(str(file.get("sample", "")))
        large = size > _MAX_REGULAR or b"\0" in sample or f".{path.rpartition('.')[2].lower()}" in _LARGE
        told = {"oid": held[path].sha256 if held[path].lfs else held[path].git} if path in held else {}
        answer.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **told})
    return JSONResponse({"files": answer})


async def lfs_batch(request: Request) -> Response:
    """Where to put large files; none for those that are there."""
    _require_writer(request)
    value, storage, access = _object(await _body(request)), storage_of(request), request.app.state.access
    answer: list[dict[str, Any]] = []
    for wanted in value.get("objects") or ():
        sha256, size = str(wanted.get("oid")), wanted.get("size")
        if not _SHA256.fullmatch(sha256) or not isinstance(size, int) or not 0 <= size <= _MAX_OBJECT:
            raise Refused(400, "BadRequest", "an object has a sha256 and a size")
        there = await run_in_threadpool(storage.blob(sha256).is_file)
        href = f"{_origin(request)}/lfs/{sha256}?{access.signed(sha256, size)}"
        answer.append({"oid": sha256, "size": size, **({} if there else {"actions": {"upload": {"href": href}}})})
    return JSONResponse({"transfer": "basic", "objects": answer}, media_type="application/vnd.git-lfs+json")


async def upload(request: Request) -> Response:
    """Takes the bytes of a large file at an address that was given out for exactly these."""
    sha256, query = request.path_params["sha256"], request.query_params
    size = request.app.state.access.require_signed(sha256, *(query.get(key, "") for key in ("size", "until", "signature")))
    storage, found, hasher = storage_of(request), 0, hashlib.sha256()
    if size + _SPARE > storage.free():
        raise Refused(507, "NoSpace", "The hub's disk is full")
    with storage.incoming() as path:
        with path.open("wb") as file:
            async for chunk in request.stream():
                found += len(chunk)
                if found > size:
                    break
                hasher.update(chunk)
                await run_in_threadpool(file.write, chunk)
        if found != size or hasher.hexdigest() != sha256:
            raise Refused(400, "BadRequest", "These are not the announced bytes")
        await run_in_threadpool(storage.keep, path, sha256, size)
    return Response()


async def commit(request: Request) -> Response:
    """One commit from lines of JSON; with ``create_pr=1`` on a new pull request."""
    author, repo, storage = _require_writer(request), repo_of(request), storage_of(request)
    lines = [_object(line) for line in (await _body(request)).split(b"\n") if line.strip()]
    header, *operations = lines or [{}]
    told = header.get("value")
    if header.get("key") != "header" or not isinstance(told, dict) or not all(isinstance(one.get("value"), dict) for one in operations):
        raise Refused(400, "BadRequest", "A commit is a header and operations")
    as_pr = request.query_params.get("create_pr") == "1"

    def change(files: dict[str, Entry]) -> None:
        for operation in operations:
            apply = _OPERATIONS.get(str(operation.get("key")))
            if apply is None:
                raise Refused(400, "BadRequest", "An operation that this hub does not have")
            apply(storage, files, operation["value"])
        if len({path.casefold() for path in files}) != len(files):
            raise Refused(400, "BadRequest", "Two paths that are one file on some systems")

    oid, number = await run_in_threadpool(
        storage.change, repo, revision_of(request), author, str(told.get("summary", "")), str(told.get("description", "")),
        parent=told.get("parentCommit"), change=change, as_pr=as_pr)
    origin = _origin(request)
    request_url = {"pullRequestUrl": f"{origin}/{repo}/discussions/{number}"} if number is not None else {}
    return JSONResponse({"success": True, "commitOid": oid, "commitUrl": f"{origin}/{repo}/commit/{oid}", "hookOutput": "", **request_url})


async def tag(request: Request) -> Response:
    """A tag on a revision."""
    return await _ref(request, "tags", str(_object(await _body(request)).get("tag")), revision_of(request))


async def branch(request: Request) -> Response:
    """A branch, by default from the main one."""
    value = _object(await _body(request) or b"{}")
    return await _ref(request, "heads", revision_of(request), str(value.get("startingPoint") or names.MAIN))


async def drop_tag(request: Request) -> Response:
    """Removes a tag."""
    _require_writer(request)
    await run_in_threadpool(storage_of(request).drop_ref, repo_of(request), "tags", revision_of(request))
    return Response()


async def _ref(request: Request, kind: str, name: str, revision: str) -> Response:
    _require_writer(request)
    await run_in_threadpool(storage_of(request).add_ref, repo_of(request), kind, name, revision)
    return Response()


def _add(storage: Any, files: dict[str, Entry], value: dict[str, Any]) -> None:
    files[_path(value)] = storage.keep_bytes(_decoded(str(value.get("content", ""))))


def _add_large(storage: Any, files: dict[str, Entry], value: dict[str, Any]) -> None:
    sha256 = str(value.get("oid"))
    if not _SHA256.fullmatch(sha256):
        raise Refused(400, "BadRequest", "a large file is named by its sha256")
    files[_path(value)] = storage.large(sha256)


def _delete(storage: Any, files: dict[str, Entry], value: dict[str, Any]) -> None:
    path = str(value.get("path")).rstrip("/")
    for gone in [name for name in files if name == path or name.startswith(f"{path}/")]:
        del files[gone]


_OPERATIONS = {"file": _add, "lfsFile": _add_large, "deletedFile": _delete, "deletedFolder": _delete}


def _path(value: dict[str, Any]) -> str:
    path = str(value.get("path"))
    if reason := names.unsafe(path):
        raise Refused(400, "BadRequest", f"A path that cannot be kept: {reason}")
    return path


def _require_writer(request: Request) -> str:
    account = request.scope["account"]
    if account is None:
        raise Refused(401, "Unauthorized", "A token is needed")
    if not account.write:
        raise Refused(403, "Forbidden", "This token may only read")
    return str(account.name)


async def _body(request: Request) -> bytes:
    parts, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > _MAX_BODY:
            raise Refused(413, "TooLarge", "The request is too large")
        parts.append(chunk)
    return b"".join(parts)


def _object(data: bytes) -> dict[str, Any]:
    value = strict_json.loads(data, "request", _MAX_BODY)
    if not isinstance(value, dict):
        raise FormatError("the request must be a JSON object")
    return value


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, "BadRequest", "This is not base64") from error


def _origin(request: Request) -> str:
    return str(request.base_url).rstrip("/")
