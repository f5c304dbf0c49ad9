"""Reads and parses the bodies of requests: never more than the route takes, and in a thread, so that nobody else waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from ...errors import FormatError
from ...io import strict_json
from ..transport.client import MAX_LISTED
from .storage import Refused

_T = TypeVar("_T")
PAUSE_SECONDS = 60.0
"""Between two pieces of a body, and of grace for the whole of it."""
_MIN_RATE = 16 << 10
"""Bytes a second, after the grace, below which a body is given up: else a client could send one for ever."""


def require_size(request: Request, max_bytes: int) -> None:
    """Notes how large the body may be, and looks at what is announced before a byte of it is read.

    Raises:
        Refused: a larger one is announced.
    """
    request.scope["max_bytes"] = max_bytes
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdecimal() and len(length) < 16):
        raise Refused(400, "BadRequest", "Content-Length is a number of bytes")
    if int(length) > max_bytes:
        raise _too_large(max_bytes)


async def chunks_of(request: Request) -> AsyncIterator[bytes]:
    """The body as it arrives.

    Raises:
        Refused: it does not go on, or too slowly.
    """
    stream, started, count = request.stream(), time.monotonic(), 0
    while True:
        left = started + PAUSE_SECONDS + count / _MIN_RATE - time.monotonic()
        try:
            async with asyncio.timeout(min(PAUSE_SECONDS, left)):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Refused(408, "Timeout", f"The request is slower than {_MIN_RATE} bytes a second, or paused") from None
        except ClientDisconnect:
            raise Refused(400, "BadRequest", "The request was broken off") from None
        count += len(chunk)
        yield chunk


async def body_of(request: Request) -> bytes:
    """The whole body.

    Raises:
        Refused: it is larger than its route takes.
    """
    parts, size, max_bytes = [], 0, int(request.scope["max_bytes"])
    async for chunk in chunks_of(request):
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        parts.append(chunk)
    return b"".join(parts)


async def parsed(request: Request, parse: Callable[[bytes], _T]) -> _T:
    """What ``parse`` makes of the body, in a thread."""
    made: _T = await run_in_threadpool(parse, await body_of(request))
    return made


async def json_of(request: Request) -> dict[str, Any]:
    """The JSON object in the body; an empty body is an empty one.

    Raises:
        FormatError: it is something else.
    """
    return await parsed(request, lambda body: json_object(body or b"{}"))


def json_object(data: bytes) -> dict[str, Any]:
    """The JSON object in some bytes.

    Raises:
        FormatError: it is something else.
    """
    value = strict_json.loads(data, "request", len(data))
    if not isinstance(value, dict):
        raise FormatError("the request must be a JSON object")
    return value


async def form_of(request: Request) -> dict[str, list[str]]:
    """The fields of a form, as a browser sends it.

    Raises:
        Refused: there are more than a listing has files.
    """
    def fields(body: bytes) -> dict[str, list[str]]:
        try:
            return parse_qs(body.decode("utf-8", "replace"), max_num_fields=MAX_LISTED)
        except ValueError as error:
            raise Refused(413, "TooLarge", f"A form may have {MAX_LISTED} fields") from error

    return await parsed(request, fields)


def _too_large(max_bytes: int) -> Refused:
    return Refused(413, "TooLarge", f"The request is too large: this one may have {max_bytes} bytes")
