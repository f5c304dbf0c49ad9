"""What a route is: who may ask what, and by which struct."""

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
    """A method at a path, who may ask (anybody, who has a key, an admin), and the structs of the body and of
    the answer.

    ``event`` is the struct of the events that it may answer by; ``errors`` is how errors are written;
    ``example`` are a body's fields besides ``model``, for who wants to try the server. What is answered by a
    ``quiet`` route is not written down, errors aside.
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
    """Lets by who may ask for what concerns all keys.

    Raises:
        HTTPError: a key that is not an admin's.
    """
    if route.access == "admin" and not key.admin:
        raise HTTPError(403, "admin_only", "this key may not see what concerns all keys")


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response with a value, such as a struct, as JSON."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")
