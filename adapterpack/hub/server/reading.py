"""Answers the requests that only read: listings, metadata, bytes of files."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from .bodies import form_of
from .storage import Commit, Entry, Refused, Storage

PAGE = 1000


def repo_of(request: Request) -> str:
    """The repository that the path names."""
    return f"{request.path_params['org']}/{request.path_params['name'].removesuffix('.git')}"


def revision_of(request: Request) -> str:
    """The revision that the path names."""
    return str(request.path_params.get("rev", "main")).replace("%2F", "/")


def storage_of(request: Request) -> Storage:
    """The storage that the application serves."""
    storage: Storage = request.app.state.storage
    return storage


def author_of(request: Request) -> str:
    """The name of whose token the request has."""
    return str(request.scope["account"].name)


def origin_of(request: Request) -> str:
    """The hub's own address, as this client writes it."""
    return str(request.base_url).rstrip("/")


async def whoami(request: Request) -> Response:
    """Who the token belongs to."""
    account = request.scope["account"]
    if account is None:
        raise Refused(401, "Unauthorized", "Invalid username or password.")
    role = "write" if account.write else "read"
    return JSONResponse({"type": "user", "name": account.name, "fullname": account.name, "orgs": [],
                         "auth": {"type": "access_token", "accessToken": {"displayName": account.name, "role": role}}})


async def models(request: Request) -> Response:
    """Every repository that the client may see; ``author`` keeps those of one owner."""
    storage, author = storage_of(request), request.query_params.get("author")

    def listed() -> list[dict[str, Any]]:
        repos = (repo for repo in storage.repos() if author in {None, repo.partition("/")[0]})
        return [{"id": repo, "modelId": repo, "private": storage.private(repo), "sha": storage.resolve(repo, "main"), "tags": []}
                for repo in repos if request.scope["account"] is not None or not storage.private(repo)]

    return JSONResponse(await run_in_threadpool(listed))


async def info(request: Request) -> Response:
    """A repository at a revision: its commit and the names of its files."""
    repo, oid, commit = await _commit(request)
    blobs = request.query_params.get("blobs") is not None
    siblings = [{"rfilename": path, **(_described(path, entry) if blobs else {})} for path, entry in commit.files.items()]
    return JSONResponse({"_id": oid, "id": repo, "modelId": repo, "sha": oid, **_settings(request, repo),
                         "disabled": False, "lastModified": commit.time, "createdAt": commit.time, "tags": [], "downloads": 0, "likes": 0,
                         "siblings": siblings})


async def tree(request: Request) -> Response:
    """Files and folders below a path, in pages that the header Link leads through."""
    _, _, commit = await _commit(request)
    query = request.query_params
    entries = _listing(commit, request.path_params.get("path", "").replace("%2F", "/"), query.get("recursive", "").lower() in {"true", "1"})
    try:
        start, limit = int(query.get("cursor", "0")), min(max(int(query.get("limit", PAGE)), 1), PAGE)
    except ValueError as error:
        raise Refused(400, "BadRequest", "cursor and limit are numbers") from error
    headers = {}
    if start + limit < len(entries):
        following = request.url.replace(query=urlencode({**query, "cursor": start + limit}))
        headers["Link"] = f'<{str(following).replace(request.url.path, quote(request.scope["path"], safe="/%"), 1)}>; rel="next"'
    return JSONResponse(entries[max(start, 0) : start + limit], headers=headers)


async def paths_info(request: Request) -> Response:
    """Some files of a revision, as the tree describes them."""
    _, _, commit = await _commit(request)
    wanted = set((await form_of(request)).get("paths", ()))
    return JSONResponse([_described(path, entry) for path, entry in commit.files.items() if path in wanted])


async def refs(request: Request) -> Response:
    """Branches, tags and pull requests with their commits."""
    repo, storage = repo_of(request), storage_of(request)

    def listed() -> dict[str, Any]:
        kinds = {"branches": ("heads", "refs/heads/"), "tags": ("tags", "refs/tags/"), "pullRequests": ("pr", "refs/pr/")}
        return {"converts": [], **{
            key: [{"name": name, "ref": f"{prefix}{name}", "targetCommit": oid} for name, oid in storage.refs(repo, kind).items()]
            for key, (kind, prefix) in kinds.items()}}

    return JSONResponse(await run_in_threadpool(listed))


async def resolve(request: Request) -> Response:
    """The bytes of a file, or a range of them; with HEAD what is known about them."""
    repo, oid, commit = await _commit(request)
    request.app.state.access.require_granted(request.scope["account"], storage_of(request).settings(repo))
    path = request.path_params["path"].replace("%2F", "/")
    entry, of_commit = commit.files.get(path), {"X-Repo-Commit": oid}
    if entry is None:
        missing = {**of_commit, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return JSONResponse({"error": "Entry not found"}, 404, missing)
    linked = {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)} if entry.lfs else {}
    headers = {**of_commit, **linked, "ETag": f'"{entry.sha256 if entry.lfs else entry.git}"', "X-Content-Type-Options": "nosniff",
               "Content-Disposition": "attachment", "Cache-Control": "private, no-transform"}
    return FileResponse(storage_of(request).blob(entry.sha256), headers=headers, media_type="application/octet-stream")


def _settings(request: Request, repo: str) -> dict[str, Any]:
    settings = storage_of(request).settings(repo)
    return {"private": settings.private, "gated": settings.gated}


async def _commit(request: Request) -> tuple[str, str, Commit]:
    repo, storage = repo_of(request), storage_of(request)

    def resolved() -> tuple[str, str, Commit]:
        oid = storage.resolve(repo, revision_of(request))
        return repo, oid, storage.commit(repo, oid)

    result: tuple[str, str, Commit] = await run_in_threadpool(resolved)
    return result


def _listing(commit: Commit, below: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{below.rstrip('/')}/" if below else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, entry in commit.files.items():
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            folder = prefix + "/".join(parts[:depth])
            entries.setdefault(folder, {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40})
        if recursive or len(parts) == 1:
            entries[path] = _described(path, entry)
    if below and not entries:
        raise Refused(404, "EntryNotFound", "Entry not found")
    return [entries[path] for path in sorted(entries)]


def _described(path: str, entry: Entry) -> dict[str, Any]:
    large = {"lfs": {"oid": entry.sha256, "size": entry.size, "pointerSize": 130}} if entry.lfs else {}
    return {"type": "file", "path": path, "size": entry.size, "oid": entry.git, **large}
