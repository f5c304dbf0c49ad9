"""Handlers of the hub's read requests: listings, metadata, and bytes of files."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any
from urllib.parse import quote, urlencode

from starlette.responses import FileResponse, JSONResponse, Response

from ...http import HTTPError, bad_request
from ...io import Json
from ..transport import MAX_LISTED, names
from .requests import HubRequest
from .storage import Commit
from .trees import Entry

PAGE = 1000
_REFS = {
    "branches": ("heads", "refs/heads/"),
    "tags": ("tags", "refs/tags/"),
    "pullRequests": ("pr", "refs/pr/"),
}


def whoami(asked: HubRequest) -> Response:
    """Returns the owner of the token."""
    if asked.account is None:
        raise HTTPError(401, "Unauthorized", "Invalid username or password.")
    name = asked.account.name
    role = "write" if asked.account.write else "read"
    return JSONResponse(
        {
            "type": "user",
            "name": name,
            "fullname": name,
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": {"displayName": name, "role": role}},
        }
    )


def models(asked: HubRequest) -> Response:
    """Lists the repositories that the client may see, in pages that the Link header connects; ``author``
    selects an owner.
    """
    storage = asked.storage
    query = asked.request.query_params

    def list_repos() -> Iterator[tuple[str, Any]]:
        for repo in storage.repos():
            if repo > query.get("cursor", "") and query.get("author") in {None, repo.partition("/")[0]}:
                private = storage.settings(repo).private
                if asked.account is not None or not private:
                    sha = storage.resolve(repo, names.MAIN)
                    yield repo, {"id": repo, "modelId": repo, "private": private, "sha": sha, "tags": []}

    return _page(asked, list_repos())


def info(asked: HubRequest) -> Response:
    """Describes a repository at a revision: its commit, and the names of its files. Above ``MAX_LISTED`` the
    list is empty, and clients list the tree in pages instead.
    """
    oid, commit = _commit(asked)
    settings = asked.storage.settings(asked.repo)
    blobs = "blobs" in asked.request.query_params
    files = commit.files if len(commit.files) <= MAX_LISTED else {}
    return JSONResponse(
        {
            "_id": oid,
            "id": asked.repo,
            "modelId": asked.repo,
            "sha": oid,
            "private": settings.private,
            "gated": settings.gated,
            "disabled": False,
            "lastModified": commit.time,
            "createdAt": commit.time,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [
                {"rfilename": path, **(_describe(path, entry) if blobs else {})}
                for path, entry in files.items()
            ],
        }
    )


def tree(asked: HubRequest) -> Response:
    """Lists files and folders below a path, in pages that the Link header connects."""
    query = asked.request.query_params
    folder = asked.path.strip("/")
    recursive = query.get("recursive", "").lower() in {"true", "1"}
    files = _commit(asked)[1].files
    if folder and "cursor" not in query and next(files.below(folder, recursive), None) is None:
        raise HTTPError(404, "EntryNotFound", "Entry not found")
    below = files.below(folder, recursive, query.get("cursor", ""))
    return _page(asked, ((path, _list_entry(path, entry)) for path, entry in below))


def _page(asked: HubRequest, items: Iterator[tuple[str, Any]]) -> Response:
    """Returns the first values of (cursor, value) pairs, with a Link to the rest."""
    query = asked.request.query_params
    headers = {}
    text = query.get("limit", str(PAGE))
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise bad_request("limit is a number")
    limit = min(max(int(text), 1), PAGE)
    page = list(islice(items, limit + 1))
    if len(page) > limit:
        path = quote(asked.request.scope["path"], safe="/%")
        headers["Link"] = (
            f'<{asked.origin}{path}?{urlencode({**query, "cursor": page[limit - 1][0]})}>; rel="next"'
        )
    return JSONResponse([value for _, value in page[:limit]], headers=headers)


def paths_info(asked: HubRequest) -> Response:
    """Describes some files of a revision, in the form of the tree."""
    files = _commit(asked)[1].files
    wanted = sorted(set(asked.form().get("paths", ())))
    return JSONResponse([_describe(path, entry) for path in wanted if (entry := files.get(path)) is not None])


def refs(asked: HubRequest) -> Response:
    """Lists branches, tags and pull requests with their commits."""
    listed = {
        key: [
            {"name": name, "ref": f"{prefix}{name}", "targetCommit": oid}
            for name, oid in asked.storage.refs(asked.repo, kind).items()
        ]
        for key, (kind, prefix) in _REFS.items()
    }
    return JSONResponse({"converts": [], **listed})


def resolve(asked: HubRequest) -> Response:
    """Returns the bytes of a file, or a range of them; for HEAD only the metadata."""
    oid, commit = _commit(asked)
    asked.hub.access.require_granted(asked.account, asked.storage.settings(asked.repo))
    entry = commit.files.get(asked.path)
    of_commit = {"X-Repo-Commit": oid}
    if entry is None:
        missing = {**of_commit, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return JSONResponse({"error": "Entry not found"}, 404, missing)
    linked = {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)} if entry.lfs else {}
    headers = {
        **of_commit,
        **linked,
        "ETag": f'"{entry.sha256 if entry.lfs else entry.git}"',
        "X-Content-Type-Options": "nosniff",
        "Content-Disposition": "attachment",
        "Cache-Control": "private, no-transform",
    }
    scope = asked.request.scope
    if "," in asked.request.headers.get("range", ""):  # a request for several ranges gets the complete file
        scope["headers"] = [(key, value) for key, value in scope["headers"] if key != b"range"]
    blob = asked.storage.blob(entry.sha256)
    return FileResponse(blob, headers=headers, media_type="application/octet-stream")


def _commit(asked: HubRequest) -> tuple[str, Commit]:
    oid = asked.storage.resolve(asked.repo, asked.revision)
    return oid, asked.storage.commit(asked.repo, oid)


def _list_entry(path: str, entry: Entry | None) -> Json:
    """Describes a file or a folder in a listing."""
    if entry is None:
        return {"type": "directory", "path": path[:-1], "size": 0, "oid": "0" * 40}
    return _describe(path, entry)


def _describe(path: str, entry: Entry) -> Json:
    large = {"lfs": {"oid": entry.sha256, "size": entry.size, "pointerSize": 130}} if entry.lfs else {}
    return {"type": "file", "path": path, "size": entry.size, "oid": entry.git, **large}
