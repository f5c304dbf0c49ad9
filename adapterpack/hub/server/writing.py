"""Handlers of the hub's write requests: repositories, commits, tags, branches. All need a token that may
write.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ...errors import ConfigError
from ...http.http_error import HTTPError
from ...io import plain_yaml
from ..transport import names
from ..transport.client import MAX_LISTED
from . import trees
from .access import NAME
from .bodies import json_object, json_of, parse_body
from .reading import author_of, origin_of, repo_of, revision_of, storage_of
from .storage import HubStorage, Settings
from .trees import Entry

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGE = frozenset({".safetensors", ".onnx", ".onnx_adapter", ".data", ".bin", ".model", ".gguf"})
_MAX_REGULAR = 10 << 20
_MAX_GRANTED = 1000
_LONGEST_HEADER = 256 << 10


async def create(request: Request) -> Response:
    """Creates a repository. If it exists already, the error contains its URL."""
    value, name = await json_of(request), author_of(request)
    owner, title = name if value.get("organization") is None else value["organization"], value.get("name")
    if not (isinstance(owner, str) and isinstance(title, str)):
        raise HTTPError(400, "BadRequest", "name and organization are text")
    repo = f"{owner}/{title}"
    address = {"url": f"{origin_of(request)}/{repo}", "id": repo}
    if value.get("type") not in {None, "model"}:
        raise HTTPError(400, "BadRequest", "This hub keeps models only")
    private = value.get("visibility") == "private" or value.get("private") is True
    try:
        await run_in_threadpool(storage_of(request).create, repo, private=private, author=name)
    except HTTPError as refused:
        if refused.status == 409:
            refused.more = address
        raise
    return JSONResponse(address)


async def settings(request: Request) -> Response:
    """Sets who may see a repository (``visibility``), and whether reading its files needs a grant
    (``gated``).
    """
    value = await json_of(request)
    changes: dict[str, Any] = {}
    if "gated" in value:
        changes["gated"] = value["gated"]
    if "visibility" in value or "private" in value:
        changes["private"] = value.get("visibility") == "private" or value.get("private") is True
    if changes.get("gated", False) not in ("auto", "manual", False) or not changes:
        raise HTTPError(400, "BadRequest", "gated is auto, manual or false; visibility is public or private")
    await run_in_threadpool(
        storage_of(request).set, repo_of(request), lambda before: dataclasses.replace(before, **changes)
    )
    return JSONResponse(changes)


async def grant(request: Request) -> Response:
    """Grants a user access to the files of a gated repository."""
    user = (await json_of(request)).get("user")
    if not isinstance(user, str) or not NAME.fullmatch(user):
        raise HTTPError(400, "BadRequest", "user is a name")

    def change(before: Settings) -> Settings:
        granted = {*before.granted, user}
        if len(granted) > _MAX_GRANTED:
            raise HTTPError(413, "TooLarge", f"A repository is granted to {_MAX_GRANTED} users at most")
        return dataclasses.replace(before, granted=tuple(sorted(granted)))

    await run_in_threadpool(storage_of(request).set, repo_of(request), change)
    return JSONResponse({})


async def validate_yaml(request: Request) -> Response:
    """Checks that the header of a README is a YAML mapping."""

    def look(body: bytes) -> str | None:
        text = str(json_object(body).get("content", ""))
        return header_problem(text[4:].partition("\n---")[0]) if text.startswith("---\n") else None

    message = await parse_body(request, look)
    return JSONResponse(
        {"errors": [{"message": message}] if message else [], "warnings": []}, 400 if message else 200
    )


async def preupload(request: Request) -> Response:
    """Tells how to send each file: in the commit, or separately as a large file. Files that exist come with
    their id.
    """
    repo, storage, wanted = repo_of(request), storage_of(request), (await json_of(request)).get("files")
    present = (
        await run_in_threadpool(lambda: storage.commit(repo, storage.resolve(repo, revision_of(request))))
    ).files
    if not isinstance(wanted, list) or not all(isinstance(file, dict) for file in wanted):
        raise HTTPError(400, "BadRequest", "files is a list")
    answer = []
    for file in wanted:
        path, size = _path(file), file.get("size")
        if not isinstance(size, int) or names.unsafe(path):
            raise HTTPError(400, "BadRequest", "a file has a path and a size")
        sample = _decode(str(file.get("sample", "")))
        large = size > _MAX_REGULAR or b"\0" in sample or f".{path.rpartition('.')[2].lower()}" in _LARGE
        oid = (
            {"oid": present[path].sha256 if present[path].lfs else present[path].git}
            if path in present
            else {}
        )
        answer.append(
            {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **oid}
        )
    return JSONResponse({"files": answer})


async def commit(request: Request) -> Response:
    """Makes one commit from lines of JSON; with ``create_pr=1`` on a new pull request."""
    author, repo, storage = author_of(request), repo_of(request), storage_of(request)
    header, *operations = await parse_body(request, _lines)
    value = header.get("value")
    if (
        header.get("key") != "header"
        or not isinstance(value, dict)
        or not all(isinstance(one.get("value"), dict) for one in operations)
    ):
        raise HTTPError(400, "BadRequest", "A commit is a header and operations")
    as_pr = request.query_params.get("create_pr") == "1"

    def change(files: dict[str, Entry]) -> None:
        steps: list[trees.Step] = []
        for operation in operations:
            step = _OPERATIONS.get(str(operation.get("key")))
            if step is None:
                raise HTTPError(400, "BadRequest", "An operation that this hub does not have")
            steps.append(step(storage, operation["value"]))
        trees.change(files, steps)
        if clash := names.clash(files):
            raise HTTPError(
                400,
                "BadRequest",
                f"Two paths that are one file on some systems: {clash[0][:80]!r} and {clash[1][:80]!r}",
            )

    oid, number = await run_in_threadpool(
        storage.change,
        repo,
        revision_of(request),
        author,
        str(value.get("summary", "")),
        str(value.get("description", "")),
        parent=value.get("parentCommit"),
        change=change,
        as_pr=as_pr,
    )
    origin = origin_of(request)
    request_url = {"pullRequestUrl": f"{origin}/{repo}/discussions/{number}"} if number is not None else {}
    return JSONResponse(
        {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{origin}/{repo}/commit/{oid}",
            "hookOutput": "",
            **request_url,
        }
    )


async def tag(request: Request) -> Response:
    """Creates a tag on a revision."""
    name = (await json_of(request)).get("tag")
    if not isinstance(name, str):
        raise HTTPError(400, "BadRequest", "tag is a name")
    return await _ref(request, "tags", name, revision_of(request))


async def branch(request: Request) -> Response:
    """Creates a branch, by default from the main branch."""
    return await _ref(
        request,
        "heads",
        revision_of(request),
        str((await json_of(request)).get("startingPoint") or names.MAIN),
    )


async def drop_tag(request: Request) -> Response:
    """Removes a tag."""
    await run_in_threadpool(storage_of(request).drop_ref, repo_of(request), "tags", revision_of(request))
    return Response()


async def _ref(request: Request, kind: str, name: str, revision: str) -> Response:
    await run_in_threadpool(storage_of(request).add_ref, repo_of(request), kind, name, revision)
    return Response()


def _lines(body: bytes) -> list[dict[str, Any]]:
    """Parses the header and operations of a commit; an empty body is an empty header."""
    if body.count(b"\n") > MAX_LISTED + 1:
        raise HTTPError(413, "TooLarge", f"A commit has at most {MAX_LISTED} operations")
    return [json_object(line) for line in body.split(b"\n") if line.strip()] or [{}]


def _add(storage: HubStorage, value: dict[str, Any]) -> trees.Step:
    return _new_path(value), storage.keep_bytes(_decode(str(value.get("content", ""))))


def _add_large(storage: HubStorage, value: dict[str, Any]) -> trees.Step:
    sha256 = str(value.get("oid"))
    if not _SHA256.fullmatch(sha256):
        raise HTTPError(400, "BadRequest", "a large file is named by its sha256")
    return _new_path(value), storage.large(sha256)


def _delete(storage: HubStorage, value: dict[str, Any]) -> trees.Step:
    return _path(value).rstrip("/"), None


_OPERATIONS: dict[str, Callable[[HubStorage, dict[str, Any]], trees.Step]] = {
    "file": _add,
    "lfsFile": _add_large,
    "deletedFile": _delete,
    "deletedFolder": _delete,
}


def _new_path(value: dict[str, Any]) -> str:
    path = _path(value)
    if reason := names.unsafe(path):
        raise HTTPError(400, "BadRequest", f"A path that cannot be kept: {reason}")
    return path


def _path(value: dict[str, Any]) -> str:
    path = value.get("path")
    if not isinstance(path, str):
        raise HTTPError(400, "BadRequest", "path is text")
    return path


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise HTTPError(400, "BadRequest", "This is not base64") from error


def header_problem(text: str) -> str | None:
    """Returns what is wrong with the YAML header of a README, or None for a mapping, in linear time.

    Example:
        >>> header_problem("license: mit"), header_problem("- mit")
        (None, 'the header is no mapping')
    """
    if len(text) > _LONGEST_HEADER:
        return f"the header is longer than {_LONGEST_HEADER} characters"
    try:
        value = plain_yaml.loads(text, None, what="the header is not YAML")
    except ConfigError as error:
        return error.what
    return None if isinstance(value, dict) else "the header is no mapping"
