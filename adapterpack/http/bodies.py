"""Reads the bodies of requests: never more than the route takes, and only from clients that go on sending."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .http_error import HTTPError

PAUSE_SECONDS = 60.0
"""Between two pieces of a body, and of grace for the whole of it."""
_MIN_RATE = 16 << 10
"""Bytes a second, after the grace, below which a body is given up: else a client could send one for ever."""


_DROPPED, _DROP_SECONDS = 16 << 20, 0.5


class DrainBodyOnError:
    """An application whose refusals reach their clients. A connection that is closed with bytes unread is
    reset, and the client would hear of that in place of the refusal: so what it still sends is read before
    the answer, for half a second and 16 MB at most.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        incoming = _Incoming(receive)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                await incoming.drop()
            await send(message)

        # the server ends: nobody needs to read that in its log
        with contextlib.suppress(asyncio.CancelledError):
            await self._app(scope, incoming, answer)


class _Incoming:
    """The messages of one request. Its body is ``_complete`` once its end has come in, and ``_paused`` where
    its application has given up waiting for the next piece.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive, self._complete, self._paused = receive, False, False

    async def __call__(self) -> Message:
        """The next message."""
        self._paused = True  # unless one comes before the wait for it is given up
        message = await self._receive()
        self._paused = False
        self._complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def drop(self) -> None:
        """Reads the rest of the body, within bounds; of a sender that paused nothing more is waited for."""
        left = _DROPPED
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DROP_SECONDS):
                while left > 0 and not (self._complete or self._paused):
                    left -= len((await self()).get("body", b""))


def require_size(request: Request, max_bytes: int) -> None:
    """Notes how large the body may be, and looks at what is announced before a byte of it is read.

    Raises:
        HTTPError: a larger one is announced.
    """
    request.scope["max_bytes"] = max_bytes
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdecimal() and len(length) < 16):
        raise HTTPError(400, "BadRequest", "Content-Length is a number of bytes")
    if int(length) > max_bytes:
        raise _too_large(max_bytes)


async def chunks_of(request: Request, seconds: float | None = None) -> AsyncIterator[bytes]:
    """The body as it arrives. ``seconds`` are those of a pause, and of grace for the whole, by default
    :data:`PAUSE_SECONDS`.

    Raises:
        HTTPError: it does not go on, or too slowly.
    """
    stream, started, count, pause = (
        request.stream(),
        time.monotonic(),
        0,
        PAUSE_SECONDS if seconds is None else seconds,
    )
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
            raise HTTPError(400, "BadRequest", "The request was broken off") from None
        count += len(chunk)
        yield chunk


async def body_of(request: Request, seconds: float | None = None) -> bytes:
    """The whole body.

    Raises:
        HTTPError: it is larger than its route takes.
    """
    parts, size, max_bytes = [], 0, int(request.scope["max_bytes"])
    async for chunk in chunks_of(request, seconds):
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        parts.append(chunk)
    return b"".join(parts)


def _too_large(max_bytes: int) -> HTTPError:
    return HTTPError(413, "TooLarge", f"The request is too large: this one may have {max_bytes} bytes")
