"""The hub as an ASGI application: its routes, and the conversion of errors to the responses that clients
expect.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import unquote, unquote_to_bytes

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...errors import AdapterpackError, FormatError
from ...http import HTTPError, bad_request, body_of
from ...paths import StrPath
from . import large, reading, writing
from .access import Access
from .collecting import Collector
from .parts import PART, UploadedParts
from .requests import Hub, HubRequest
from .storage import HubStorage

Handler = Callable[[HubRequest], Response | Awaitable[Response]]
"""Answers a request, in a thread; an upload, whose body is read while it arrives, in the event loop."""
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")
_HOST = re.compile(rb"([A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?")
_LOG = logging.getLogger("uvicorn.error")
_COLLECT_SECONDS = 3600.0
_FORM = 1 << 20
_TEXT = 4 << 20
_COMMIT = 64 << 20


class HubRoute(NamedTuple):
    """A method at a path. ``writes`` requires a token that may write; ``max_bytes`` limits the body.

    Uploads are limited by their URL instead, which is signed for a number of bytes.
    """

    method: str
    path: str
    handler: Handler
    writes: bool = False
    max_bytes: int | None = 0


_writes = partial(HubRoute, writes=True, max_bytes=_FORM)
ROUTES: tuple[HubRoute, ...] = (
    HubRoute("GET", "/api/whoami-v2", reading.whoami),
    HubRoute("GET", "/api/models", reading.models),
    HubRoute("GET", "/api/models/{org}/{name}", reading.info),
    HubRoute("GET", "/api/models/{org}/{name}/revision/{rev}", reading.info),
    HubRoute("GET", "/api/models/{org}/{name}/tree/{rev}", reading.tree),
    HubRoute("GET", "/api/models/{org}/{name}/tree/{rev}/{path:path}", reading.tree),
    HubRoute("POST", "/api/models/{org}/{name}/paths-info/{rev}", reading.paths_info, max_bytes=_FORM),
    HubRoute("GET", "/api/models/{org}/{name}/refs", reading.refs),
    HubRoute("GET", "/{org}/{name}/resolve/{rev}/{path:path}", reading.resolve),  # Starlette adds HEAD
    _writes("POST", "/api/repos/create", writing.create),
    _writes("PUT", "/api/models/{org}/{name}/settings", writing.settings),
    _writes("POST", "/api/models/{org}/{name}/user-access-request/grant", writing.grant),
    _writes("POST", "/api/validate-yaml", writing.validate_yaml, max_bytes=_TEXT),
    _writes("POST", "/api/models/{org}/{name}/preupload/{rev}", writing.preupload, max_bytes=_TEXT),
    _writes("POST", "/{org}/{name}/info/lfs/objects/batch", large.batch),
    HubRoute("PUT", "/lfs/{sha256}", large.upload, max_bytes=None),
    HubRoute("PUT", "/lfs/{sha256}/{number}", large.upload_part, max_bytes=None),
    HubRoute("POST", "/lfs/{sha256}", large.complete, max_bytes=_FORM),
    _writes("POST", "/api/models/{org}/{name}/commit/{rev}", writing.commit, max_bytes=_COMMIT),
    _writes("POST", "/api/models/{org}/{name}/tag/{rev}", writing.tag),
    HubRoute("DELETE", "/api/models/{org}/{name}/tag/{rev}", writing.drop_tag, writes=True),
    _writes("POST", "/api/models/{org}/{name}/branch/{rev}", writing.branch),
)
"""All routes of the hub."""


def build(folder: StrPath, access: Access | None = None, part: int = PART) -> Starlette:
    """Builds the application that serves the hub in ``folder``; files of more than ``part`` bytes are
    uploaded in parts.

    Example:
        >>> import tempfile
        >>> [route.path for route in build(tempfile.mkdtemp()).routes][0]
        '/api/whoami-v2'
    """
    storage = HubStorage(folder)
    hub = Hub(storage, access or Access(), UploadedParts(storage), part)
    app = Starlette(
        routes=[Route(route.path, _handler(route, hub), methods=[route.method]) for route in ROUTES],
        lifespan=lambda app: _collecting(Collector(storage, hub.parts)),
    )
    app.router.redirect_slashes = False  # a redirect would echo an untrusted URL
    app.add_middleware(AddressMiddleware)
    return app


@asynccontextmanager
async def _collecting(collector: Collector) -> AsyncIterator[None]:
    """Removes unneeded files periodically while the hub runs."""

    async def rounds() -> None:
        while True:
            try:
                await run_in_threadpool(collector.collect)
            except AdapterpackError as error:
                _LOG.warning("what nobody needs could not be removed: %s", error)
            await asyncio.sleep(_COLLECT_SECONDS)

    task = asyncio.create_task(rounds())
    yield
    task.cancel()


class AddressMiddleware:
    """Splits paths where the client did, and keeps control characters out of headers in both directions.

    A revision may contain a slash, which clients write as %2F: it remains one path segment until a handler
    decodes it.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on, unless its URL contains a control character or its Host header is
        malformed.
        """

        async def send_clean(message: Any) -> None:
            # an echoed value must not end a header and begin another
            if message["type"] == "http.response.start":
                message = {
                    **message,
                    "headers": [
                        (key, _CONTROL.sub(b"?", value).strip()) for key, value in message["headers"]
                    ],
                }
            await send(message)

        raw = scope.get("raw_path")
        if scope["type"] == "http" and raw is not None:
            parts = raw.partition(b"?")[0].decode("latin-1").split("/")
            scope = {**scope, "path": "/".join(unquote(part).replace("/", "%2F") for part in parts)}
            problem = None
            if _CONTROL.search(unquote_to_bytes(raw + b"?" + scope["query_string"])):
                problem = "No address holds a control character"
            elif not all(_HOST.fullmatch(value) for key, value in scope["headers"] if key == b"host"):
                problem = "Host is a name or an address, and a port"
            if problem is not None:
                await _refusal(bad_request(problem))(scope, receive, send_clean)
                return
        await self.app(scope, receive, send_clean)


def _handler(route: HubRoute, hub: Hub) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            asked = HubRequest(request, hub, hub.access.account(request.headers.get("authorization")))
            if "org" in request.path_params:
                await run_in_threadpool(_require_visible, asked)
            if route.writes:
                hub.access.require_writer(asked.account)
            if route.max_bytes is None:
                return await route.handler(asked)
            body = await body_of(request, route.max_bytes)
            return await run_in_threadpool(route.handler, replace(asked, body=body))
        except HTTPError as refused:
            return _refusal(refused)
        except FormatError as error:
            return _refusal(bad_request(error.what))
        except AdapterpackError as error:
            return _refusal(HTTPError(500, "ServerError", error.what))

    return answer


def _require_visible(asked: HubRequest) -> None:
    """Checks that a request may see the repository. Without a token a private repository looks as if it did
    not exist.
    """
    try:
        hidden = asked.storage.settings(asked.repo).private
    except HTTPError:
        hidden = True
    if hidden and asked.account is None:
        raise HTTPError(401, "RepoNotFound", "Repository not found")


def _refusal(refused: HTTPError) -> Response:
    message = refused.what.encode("ascii", "replace").decode("ascii")
    return JSONResponse(
        {"error": message, **refused.more},
        refused.status,
        {"X-Error-Code": refused.name, "X-Error-Message": message},
    )
