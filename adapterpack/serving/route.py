"""Defines a route: its method and path, who may use it, and its structs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec
from starlette.responses import Response

from ..http.http_error import HTTPError
from .openai.errors import OPENAI, ErrorForm
from .state import RequestContext
from .tenants.keys import Key

Handler = Callable[[RequestContext], Awaitable[Response]]


class RouteSpec(NamedTuple):
    """A method at a path, who may use it (anyone, holders of a key, or admins), and the structs of its body
    and response.

    ``event`` is the struct of stream events; ``errors`` is the form of errors; ``example`` are fields of a
    body, besides ``model``, with which to try the route. Successful requests to a ``quiet`` route are not
    logged.
    """

    method: str
    path: str
    handler: Handler
    access: Literal["open", "key", "admin"]
    summary: str
    body: type[Any] | None = None
    answer: type[Any] | None = None
    event: type[Any] | None = None
    errors: ErrorForm = OPENAI
    example: Mapping[str, Any] | None = None
    quiet: bool = False


def require_access(route: RouteSpec, key: Key) -> None:
    """Checks that a key may use a route for admins.

    Raises:
        HTTPError: the route is for admins, and the key is not an admin's.
    """
    if route.access == "admin" and not key.admin:
        raise HTTPError(403, "admin_only", "this key may not see what concerns all keys")


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Makes a JSON response of a value, such as a struct."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")
