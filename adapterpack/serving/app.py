"""The server as an ASGI application: authenticates, bounds and handles each request, turns errors into
responses, and records every request once.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from ..errors import AdapterpackError
from ..http import HTTPError
from .answering import GONE
from .observability import Record
from .openai import as_http_error, response
from .route import RequestContext, RouteSpec, State
from .tenants import EVERYBODY, Key, Keys

_TRACE = ("traceparent", "tracestate")
"""The W3C headers with which a client names the trace of a request."""
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_CODES = {
    404: ("not_found", "there is no such route"),
    405: ("method_not_allowed", "this route takes another method, which the header Allow names"),
}
_LOG = logging.getLogger("adapterpack.serving")


def build(state: State, routes: Sequence[RouteSpec], keys: Keys | None = None) -> Starlette:
    """Builds the application of a server; ``keys`` are those that open its routes, by default all of the
    server's.
    """
    served = [
        Route(route.path, _Endpoint(state, route, keys or state.keys), methods=[route.method])
        for route in routes
    ]
    app = Starlette(routes=served, exception_handlers={HTTPException: _no_route(routes)})
    app.router.redirect_slashes = False  # a redirect would echo untrusted input
    return app


def _no_route(routes: Sequence[RouteSpec]) -> Callable[[Request, Exception], Awaitable[Response]]:
    """Returns the handler for unknown routes. It lists the known ones, since a bundle has only the routes of
    its task.
    """
    posts = ", ".join(route.path for route in routes if route.method == "POST")

    async def answer_missing(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code, what = _CODES.get(error.status_code, ("invalid_request", str(error.detail)))
        if error.status_code == HTTPStatus.NOT_FOUND:
            what = f"{what} on this server, which answers POST {posts}"
        answer = response(HTTPError(error.status_code, code, what, close=True))
        answer.headers.update(error.headers or {})  # includes Allow, with the methods of the route
        return answer

    return answer_missing


class _Endpoint:
    """The ASGI endpoint of one route."""

    def __init__(self, state: State, route: RouteSpec, keys: Keys) -> None:
        self._state = state
        self._route = route
        self._keys = keys

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request, and records it exactly once, whatever happens."""
        request = Request(scope, receive)
        given = request.headers.get("x-request-id", "")
        trace = {name: value for name in _TRACE if (value := request.headers.get(name)) is not None}
        record = Record(
            given if _ID.fullmatch(given) else secrets.token_hex(12),
            f"{self._route.method} {self._route.path}",
            trace=trace,
        )
        try:
            answer = await self._answer(request, record)
            answer.headers["X-Request-Id"] = record.id
            answer.headers["X-Content-Type-Options"] = "nosniff"
            record.status = answer.status_code
            await answer(scope, receive, send)
        finally:
            if self._route.access != "open" and not (self._route.quiet and record.status == 200):
                for hear in self._state.ended:
                    hear(record)

    async def _answer(self, request: Request, record: Record) -> Response:
        key = EVERYBODY
        try:
            key = await self._authenticate(request, record)
            answer = await self._route.handler(RequestContext(self._state, request, key, record))
        except AdapterpackError as error:
            refused = as_http_error(error)
            if refused.status >= 500 and error is not refused:
                _LOG.error("request %s: %s", record.id, error)
            record.outcome = refused.name
            answer = response(refused, self._route.errors)
        except ClientDisconnect:
            record.outcome = "disconnected"
            answer = response(HTTPError(GONE, "disconnected", "the client has gone"))
        except Exception:
            _LOG.exception("request %s", record.id)
            record.outcome = "bug"
            answer = response(
                HTTPError(500, "bug", "this is a bug in adapterpack: the server's log says more"),
                self._route.errors,
            )
        answer.headers.update(self._state.quotas.headers(key))
        return answer

    async def _authenticate(self, request: Request, record: Record) -> Key:
        """Returns the key of a request, after the checks that need no body.

        Raises:
            HTTPError: the request's head is too large, its Host header is wrong (DNS rebinding), its key is
                missing, wrong, or not an admin's, or the server is shutting down.
        """
        state = self._state
        headers = request.scope["headers"]
        if (
            len(headers) > state.limits.headers
            or sum(len(name) + len(value) for name, value in headers) > state.limits.header_bytes
        ):
            raise HTTPError(
                431,
                "large_headers",
                f"a request may have at most {state.limits.headers} headers of "
                f"{state.limits.header_bytes} bytes in all",
                close=True,
            )
        hosts = request.headers.getlist("host")
        if len(hosts) > 1 or (state.hosts is not None and not {_name(host) for host in hosts} <= state.hosts):
            raise HTTPError(
                400,
                "wrong_host",
                "this server does not answer under this host name",
                param="Host",
                close=True,
            )
        if self._route.access == "open":
            return EVERYBODY
        await self._keys.look()
        own = request.headers.get("x-api-key")  # where Anthropic's clients put the key
        key = self._keys.of(request.headers.get("authorization") or (own and f"Bearer {own}"))
        record.key = key.id
        if self._route.access == "admin" and not key.admin:
            raise HTTPError(
                403, "admin_only", "this route needs a key with admin: true, as it shows data of all keys"
            )
        if self._route.method == "POST":
            state.admission.require_open()
        return key


def _name(host: str) -> str:
    """Returns the name in a Host header without its port."""
    return re.sub(r":[0-9]{1,5}\Z", "", host).lower()
