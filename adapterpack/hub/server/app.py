"""The hub as an ASGI application: routes, and one place where refusals become the answers that clients know errors by."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...errors import AdapterpackError, FormatError
from . import large, reading, writing
from .access import Access
from .parts import PART, Parts
from .storage import Refused, Storage

Handler = Callable[[Request], Awaitable[Response]]

ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/api/whoami-v2", reading.whoami),
    ("GET", "/api/models", reading.models),
    ("GET", "/api/models/{org}/{name}", reading.info),
    ("GET", "/api/models/{org}/{name}/revision/{rev}", reading.info),
    ("GET", "/api/models/{org}/{name}/tree/{rev}", reading.tree),
    ("GET", "/api/models/{org}/{name}/tree/{rev}/{path:path}", reading.tree),
    ("POST", "/api/models/{org}/{name}/paths-info/{rev}", reading.paths_info),
    ("GET", "/api/models/{org}/{name}/refs", reading.refs),
    ("GET", "/{org}/{name}/resolve/{rev}/{path:path}", reading.resolve),  # HEAD comes with it
    ("POST", "/api/repos/create", writing.create),
    ("PUT", "/api/models/{org}/{name}/settings", writing.settings),
    ("POST", "/api/models/{org}/{name}/user-access-request/grant", writing.grant),
    ("POST", "/api/validate-yaml", writing.validate_yaml),
    ("POST", "/api/models/{org}/{name}/preupload/{rev}", writing.preupload),
    ("POST", "/{org}/{name}/info/lfs/objects/batch", large.batch),
    ("PUT", "/lfs/{sha256}", large.upload),
    ("PUT", "/lfs/{sha256}/{number:int}", large.upload_part),
    ("POST", "/lfs/{sha256}", large.complete),
    ("POST", "/api/models/{org}/{name}/commit/{rev}", writing.commit),
    ("POST", "/api/models/{org}/{name}/tag/{rev}", writing.tag),
    ("DELETE", "/api/models/{org}/{name}/tag/{rev}", writing.drop_tag),
    ("POST", "/api/models/{org}/{name}/branch/{rev}", writing.branch),
)
"""Method, path, handler: what a client of this hub can ask."""


def build(folder: str | os.PathLike[str], access: Access | None = None, part: int = PART) -> Starlette:
    """The application that serves the hub in ``folder``; files of more than ``part`` bytes arrive in parts.

    Example:
        >>> import tempfile
        >>> [route.path for route in build(tempfile.mkdtemp()).routes][0]
        '/api/whoami-v2'
    """
    app = Starlette(routes=[Route(path, _answering(handler), methods=[method]) for method, path, handler in ROUTES])
    app.state.storage, app.state.access, app.state.part = Storage(folder), access or Access(), part
    app.state.parts = Parts(app.state.storage)
    app.add_middleware(WholeSegments)
    return app


class WholeSegments:
    """A revision may hold a slash, which clients write as %2F: it stays one segment of the path until a handler asks for it."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes the request on with its path split where the client split it."""
        raw = scope.get("raw_path")
        if scope["type"] == "http" and raw is not None:
            segments = [unquote(part).replace("/", "%2F") for part in raw.partition(b"?")[0].decode("latin-1").split("/")]
            scope = {**scope, "path": "/".join(segments)}
        await self.app(scope, receive, send)


def _answering(handler: Handler) -> Handler:
    async def answer(request: Request) -> Response:
        try:
            request.scope["account"] = request.app.state.access.account(request.headers.get("authorization"))
            if "org" in request.path_params:
                await run_in_threadpool(_require_visible, request)
            return await handler(request)
        except Refused as refused:
            return _refusal(refused.status, refused.name, refused.what)
        except FormatError as error:
            return _refusal(400, "BadRequest", error.what)
        except AdapterpackError as error:
            return _refusal(500, "ServerError", error.what)

    return answer


def _require_visible(request: Request) -> None:
    """A private repository is to strangers one that does not exist."""
    repo = reading.repo_of(request)
    if request.app.state.storage.private(repo) and request.scope["account"] is None:
        raise Refused(401, "RepoNotFound", "Repository not found")


def _refusal(status: int, name: str, what: str) -> Response:
    message = what.encode("ascii", "replace").decode("ascii").replace("\n", " ")
    return JSONResponse({"error": message}, status, {"X-Error-Code": name, "X-Error-Message": message})
