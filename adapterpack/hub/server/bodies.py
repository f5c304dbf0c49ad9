"""Parses request bodies on a thread, so that the event loop is not blocked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from ...errors import FormatError
from ...http.bodies import body_of
from ...http.http_error import HTTPError
from ...io import strict_json
from ..transport.client import MAX_LISTED

_T = TypeVar("_T")


async def parse_body(request: Request, parse: Callable[[bytes], _T]) -> _T:
    """Reads the body and runs ``parse`` on it on a thread."""
    made: _T = await run_in_threadpool(parse, await body_of(request))
    return made


async def json_of(request: Request) -> dict[str, Any]:
    """Parses the JSON object in the body; an empty body is an empty object.

    Raises:
        FormatError: the body is no JSON object.
    """
    return await parse_body(request, lambda body: json_object(body or b"{}"))


def json_object(data: bytes) -> dict[str, Any]:
    """Parses a JSON object from bytes.

    Raises:
        FormatError: the body is no JSON object.
    """
    value = strict_json.loads(data, "request", len(data))
    if not isinstance(value, dict):
        raise FormatError("the request must be a JSON object")
    return value


async def form_of(request: Request) -> dict[str, list[str]]:
    """Parses the fields of a URL-encoded form.

    Raises:
        HTTPError: the form has more fields than a listing may have files.
    """

    def fields(body: bytes) -> dict[str, list[str]]:
        try:
            return parse_qs(body.decode("utf-8", "replace"), max_num_fields=MAX_LISTED)
        except ValueError as error:
            raise HTTPError(413, "TooLarge", f"A form may have {MAX_LISTED} fields") from error

    return await parse_body(request, fields)
