"""Handlers of the hub's read requests: listings, metadata, and bytes of files."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from operator import itemgetter
from typing import Any
from urllib.parse import quote, urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from ...http.http_error import HTTPError
from ..transport.client import MAX_LISTED
from .bodies import form_of
from .storage import Commit, HubStorage
from .trees import Entry

PAGE = 1000


def repo_of(request: Request) -> str:
    """Returns the repository in the path."""
    return f"{request.path_params['org']}/{request.path_params['name'].removesuffix('.git')}"


def revision_of(request: Request) -> str:
    """Returns the revision in the path."""
    return str(request.path_params.get("rev", "main")).replace("%2F", "/")


def storage_of(request: Request) -> HubStorage:
    """Returns the storage of the application."""
    storage: HubStorage = request.app.state.storage
    return storage


def author_of(request: Request) -> str:
    """Returns the name of the request's account."""
    return str(request.scope["account"].name)


def origin_of(request: Request) -> str:
    """Returns the hub's own URL as this client writes it."""
    return str(request.base_url).rstrip("/")


async def whoami(request: Request) -> Response:
    """Returns the owner of the token."""
    account = request.scope["account"]
    if account is None:
        raise HTTPError(401, "Unauthorized", "Invalid username or password.")
    role = "write" if account.write else "read"
    return JSONResponse(
        {
            "type": "user",
            "name": account.name,
            "fullname": account.name,
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": {"displayName": account.name, "role": role}},
        }
    )


async def models(request: Request) -> Response:
    """Lists the repositories that the client may see, in pages that the Link header connects; ``author``
    selects an owner.
    """
    storage, query = storage_of(request), request.query_params
    author, cursor, limit = query.get("author"), query.get("cursor", ""), _limit(request)

    def read() -> list[dict[str, Any]]:
        repos = (
            repo for repo in storage.repos() if repo > cursor and author in {None, repo.partition("/")[0]}
        )
        seen = (repo for repo in repos if request.scope["account"] is not None or not storage.private(repo))
        return [
            {
                "id": repo,
                "modelId": repo,
                "private": storage.private(repo),
                "sha": storage.resolve(repo, "main"),
                "tags": [],
            }
            for repo in islice(seen, limit + 1)
        ]

    return _page(request, await run_in_threadpool(read), limit, lambda one: str(one["id"]))


async def info(request: Request) -> Response:
    """Describes a repository at a revision: its commit, and the names of its files if they are few enough for
    clients.
    """
    repo, oid, commit = await _commit(request)
    blobs = request.query_params.get("blobs") is not None

    def read() -> Response:
        files = commit.files if len(commit.files) <= MAX_LISTED else {}
        siblings = [
            {"rfilename": path, **(_describe(path, entry) if blobs else {})} for path, entry in files.items()
        ]
        return JSONResponse(
            {
                "_id": oid,
                "id": repo,
                "modelId": repo,
                "sha": oid,
                **_settings(request, repo),
                "disabled": False,
                "lastModified": commit.time,
                "createdAt": commit.time,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
            }
        )

    answer: Response = await run_in_threadpool(read)
    return answer


async def tree(request: Request) -> Response:
    """Lists files and folders below a path, in pages that the Link header connects."""
    _, _, commit = await _commit(request)
    query, limit = request.query_params, _limit(request)
    folder = request.path_params.get("path", "").replace("%2F", "/").strip("/")
    recursive = query.get("recursive", "").lower() in {"true", "1"}
    below = commit.files.below(folder, recursive, query.get("cursor", ""))
    entries = await run_in_threadpool(
        lambda: [(path, _list_entry(path, entry)) for path, entry in islice(below, limit + 1)]
    )
    if folder and not entries and "cursor" not in query:
        raise HTTPError(404, "EntryNotFound", "Entry not found")
    return _page(request, entries, limit, itemgetter(0), itemgetter(1))


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", str(PAGE))
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise HTTPError(400, "BadRequest", "limit is a number")
    return min(max(int(text), 1), PAGE)


def _page(
    request: Request,
    items: list[Any],
    limit: int,
    cursor: Callable[[Any], str],
    shown: Callable[[Any], Any] = lambda item: item,
) -> Response:
    """Returns the first items, with a Link to the rest."""
    headers, page = {}, items[:limit]
    if len(items) > limit:
        query = urlencode({**request.query_params, "cursor": cursor(page[-1])})
        headers["Link"] = (
            f'<{origin_of(request)}{quote(request.scope["path"], safe="/%")}?{query}>; rel="next"'
        )
    return JSONResponse([shown(item) for item in page], headers=headers)


async def paths_info(request: Request) -> Response:
    """Describes some files of a revision, in the form of the tree."""
    _, _, commit = await _commit(request)
    wanted = sorted(set((await form_of(request)).get("paths", ())))
    answer = await run_in_threadpool(
        lambda: [_describe(path, entry) for path in wanted if (entry := commit.files.get(path)) is not None]
    )
    return JSONResponse(answer)


async def refs(request: Request) -> Response:
    """Lists branches, tags and pull requests with their commits."""
    repo, storage = repo_of(request), storage_of(request)

    def read() -> dict[str, Any]:
        kinds = {
            "branches": ("heads", "refs/heads/"),
            "tags": ("tags", "refs/tags/"),
            "pullRequests": ("pr", "refs/pr/"),
        }
        return {
            "converts": [],
            **{
                key: [
                    {"name": name, "ref": f"{prefix}{name}", "targetCommit": oid}
                    for name, oid in storage.refs(repo, kind).items()
                ]
                for key, (kind, prefix) in kinds.items()
            },
        }

    return JSONResponse(await run_in_threadpool(read))


async def resolve(request: Request) -> Response:
    """Returns the bytes of a file, or a range of them; for HEAD only the metadata."""
    repo, oid, commit = await _commit(request)
    path, storage = request.path_params["path"].replace("%2F", "/"), storage_of(request)
    request.app.state.access.require_granted(
        request.scope["account"], await run_in_threadpool(storage.settings, repo)
    )
    entry, of_commit = await run_in_threadpool(commit.files.get, path), {"X-Repo-Commit": oid}
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
    if "," in request.headers.get("range", ""):  # a request for several ranges gets the complete file
        request.scope["headers"] = [
            (key, value) for key, value in request.scope["headers"] if key != b"range"
        ]
    return FileResponse(storage.blob(entry.sha256), headers=headers, media_type="application/octet-stream")


def _settings(request: Request, repo: str) -> dict[str, Any]:
    settings = storage_of(request).settings(repo)
    return {"private": settings.private, "gated": settings.gated}


async def _commit(request: Request) -> tuple[str, str, Commit]:
    repo, storage = repo_of(request), storage_of(request)

    def read() -> tuple[str, str, Commit]:
        oid = storage.resolve(repo, revision_of(request))
        return repo, oid, storage.commit(repo, oid)

    result: tuple[str, str, Commit] = await run_in_threadpool(read)
    return result


def _list_entry(path: str, entry: Entry | None) -> dict[str, Any]:
    """Describes a file or a folder in a listing."""
    return (
        {"type": "directory", "path": path[:-1], "size": 0, "oid": "0" * 40}
        if entry is None
        else _describe(path, entry)
    )


def _describe(path: str, entry: Entry) -> dict[str, Any]:
    large = {"lfs": {"oid": entry.sha256, "size": entry.size, "pointerSize": 130}} if entry.lfs else {}
    return {"type": "file", "path": path, "size": entry.size, "oid": entry.git, **large}
