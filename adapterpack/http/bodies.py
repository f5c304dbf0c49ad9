"""Reads request bodies: never more than the route accepts, and only from clients that keep sending; and the
fields of forms.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from email.message import Message as Headers
from email.parser import BytesHeaderParser

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .http_error import HTTPError, bad_request

PAUSE_SECONDS = 60.0
"""The longest pause between two pieces of a body, and the grace period for the complete body."""
_MIN_RATE = 16 << 10
"""The least bytes a second after the grace period. Without it a client could send a body for ever."""


_DROPPED = 16 << 20
_DROP_SECONDS = 0.5


class DrainBodyOnError:
    """An ASGI wrapper that makes sure that error responses reach their clients.

    Closing a connection with unread bytes resets it, and the client would see that instead of the error. So
    before an error response it reads what the client still sends, for at most half a second and 16 MB.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        incoming = _Incoming(receive)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                await incoming.drop()
            await send(message)

        # cancelled at shutdown, which need not be logged
        with contextlib.suppress(asyncio.CancelledError):
            await self._app(scope, incoming, answer)


class _Incoming:
    """The messages of one request. ``_complete``: the body has ended. ``_paused``: the application gave up
    waiting for the next piece.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._complete = False
        self._paused = False

    async def __call__(self) -> Message:
        """Returns the next message."""
        self._paused = True  # reset below if a message arrives before the wait is given up
        message = await self._receive()
        self._paused = False
        self._complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def drop(self) -> None:
        """Reads the rest of the body, within limits. Does not wait for a client that has paused."""
        left = _DROPPED
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DROP_SECONDS):
                while left > 0 and not (self._complete or self._paused):
                    left -= len((await self()).get("body", b""))


async def chunks_of(request: Request, seconds: float | None = None) -> AsyncIterator[bytes]:
    """Yields the body as it arrives. ``seconds`` limits a pause, and is the grace period for the complete
    body; by default :data:`PAUSE_SECONDS`.

    Raises:
        HTTPError: the body pauses or arrives too slowly.
    """
    stream = request.stream()
    started = time.monotonic()
    count = 0
    pause = PAUSE_SECONDS if seconds is None else seconds
    while True:
        left = started + pause + count / _MIN_RATE - time.monotonic()
        try:
            async with asyncio.timeout(min(pause, left)):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise HTTPError(
                408, "Timeout", f"The request is slower than {_MIN_RATE} bytes a second, or paused"
            ) from None
        except ClientDisconnect:
            raise bad_request("The request was broken off") from None
        count += len(chunk)
        yield chunk


async def body_of(request: Request, max_bytes: int, seconds: float | None = None) -> bytes:
    """Reads the complete body. Checks the announced length before reading any of it.

    Raises:
        HTTPError: the body is larger than ``max_bytes``, or see :func:`chunks_of`.
    """
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdecimal() and len(length) < 16):
        raise bad_request("Content-Length is a number of bytes")
    if int(length) > max_bytes:
        raise _too_large(max_bytes)
    parts = []
    size = 0
    async for chunk in chunks_of(request, seconds):
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        parts.append(chunk)
    return b"".join(parts)


_MOST_FIELDS = 64
_MOST_HEADERS = 4 << 10


def fields_of(data: bytes, content_type: str) -> dict[str, bytes]:
    """Parses a body of ``multipart/form-data`` (RFC 7578): the name of each field -> its content.

    Raises:
        HTTPError: the body is no such form, ends too early, or has too many fields or two of one name.

    Example:
        >>> form = b'--x\\r\\nContent-Disposition: form-data; name="a"\\r\\n\\r\\nB\\r\\n--x--'
        >>> fields_of(form, "multipart/form-data; boundary=x")
        {'a': b'B'}
    """
    head = Headers()
    head["Content-Type"] = content_type
    boundary = head.get_boundary("")
    if head.get_content_type() != "multipart/form-data" or not boundary:
        raise HTTPError(
            415, "unsupported_media_type", "the body is multipart/form-data", param="Content-Type"
        )
    mark = b"\r\n--" + boundary.encode("latin-1", "replace")
    first, *parts = (b"\r\n" + data).split(mark, _MOST_FIELDS + 2)
    if not parts or first or not parts[-1].startswith(b"--"):
        raise bad_request("The form is not complete, or has too many fields")
    fields = {}
    for part in parts[:-1]:
        headers, _, content = part.partition(b"\r\n\r\n")
        named = BytesHeaderParser().parsebytes(headers[:_MOST_HEADERS].lstrip())
        name = named.get_param("name", header="content-disposition")
        if not isinstance(name, str) or name in fields:
            raise bad_request("Each field of a form has a name of its own")
        fields[name] = content
    return fields


def _too_large(max_bytes: int) -> HTTPError:
    return HTTPError(413, "TooLarge", f"The request is too large: this one may have {max_bytes} bytes")
