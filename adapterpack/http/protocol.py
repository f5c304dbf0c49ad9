"""HTTP/1.1 for uvicorn with deadlines: closes connections whose clients stall, so that they cannot use up all
connections.
"""

from __future__ import annotations

import json
import logging
import os
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from . import bodies

HEAD_SECONDS = 20.0
_HEAD_BYTES = 16 << 10
_MOST = 1000
_DROP_SECONDS = 0.5
"""Seconds for which a refused client may still send. Closing a connection with unread bytes resets it, and
the client would see that instead of the error.
"""


def _is_news(record: logging.LogRecord) -> bool:
    """Filters uvicorn's log: drops lines that any client can cause at will, such as those for bytes that are
    no HTTP.
    """
    return not (
        record.levelno == logging.WARNING and record.module == H11Protocol.__module__.rpartition(".")[2]
    )


logging.getLogger("uvicorn.error").addFilter(_is_news)


class _Connection(h11.Connection):  # type: ignore[misc]
    """Refuses a request with two contradictory body lengths, or with a length that its HTTP version does not
    define.

    A proxy that reads the other length would forward the rest as somebody else's request (request smuggling,
    RFC 9112, section 6.1).
    """

    status = 400
    """The status for a client whose bytes are no HTTP; 431 if its head is too long."""

    def next_event(self) -> Any:
        """Returns the next event of the connection.

        Raises:
            h11.RemoteProtocolError: the client does not speak HTTP, or sent such a request.
        """
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            self.status = 431 if error.error_status_hint == 431 else 400
            raise
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if b"transfer-encoding" in names and (b"content-length" in names or event.http_version < b"1.1"):
                raise h11.RemoteProtocolError("Transfer-Encoding beside Content-Length, or before HTTP/1.1")
        return event


class Protocol(H11Protocol):  # type: ignore[misc]
    """uvicorn's HTTP/1.1 with deadlines for the head of a request, and for clients that do not read their
    response.

    With too many connections it closes the one that has waited longest for its client. A client that sends
    promptly and reads its response is thus served however many others do not.
    """

    watch: Any = None
    refused = False
    malformed = 0
    """How often clients sent bytes that were no HTTP, over all connections of the process."""

    def __init__(self, config: uvicorn.Config, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.conn = _Connection(h11.SERVER, config.h11_max_incomplete_event_size or _HEAD_BYTES)

    def connection_made(self, transport: Any) -> None:
        """Makes room for the connection if necessary, and starts to watch it."""
        super().connection_made(transport)
        self.moved = self.idle_since = self.unread_since = self.loop.time()
        self.unread = 0
        if len(self.connections) > _most():
            min(
                (one for one in self.connections if one.waits()), key=lambda one: one.moved, default=self
            ).transport.abort()
        self._look_again()

    def data_received(self, data: bytes) -> None:
        """Records when the client last sent something. Ignores what it sends after a refusal."""
        self.moved = self.loop.time()
        if self.refused:
            return
        super().data_received(data)

    def on_response_complete(self) -> None:
        """Records from when on the client may send its next request."""
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops watching the connection."""
        if self.watch is not None:
            self.watch.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuses bytes that are no HTTP and reads no more from this client. A running request is told that
        its client has disconnected.
        """
        Protocol.malformed += 1
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            self._refuse("large_headers" if self.conn.status == 431 else "not_http", msg)
        else:
            self.transport.abort()
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _refuse(self, code: str, message: str) -> None:
        body = json.dumps(
            {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
        ).encode()
        head = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=self.conn.status, headers=head),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.refused = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_DROP_SECONDS, self.transport.close)

    def break_off(self) -> None:
        """Closes the connection in any state. A running request is told that its client has disconnected."""
        if self.cycle is not None:
            self.cycle.disconnected = True
        self.transport.abort()

    def waits(self) -> bool:
        """Returns whether it is the client's turn: to send a request or the rest of one, or to read."""
        return self._idle() or self.cycle.more_body or self.transport.get_write_buffer_size() > 0

    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _look_again(self) -> None:
        self.watch = self.loop.call_later(min(HEAD_SECONDS, bodies.PAUSE_SECONDS) / 4, self._look)

    def _look(self) -> None:
        """Closes the connection if the head of a request, or the client's reading, has taken too long."""
        now = self.loop.time()
        unread = self.transport.get_write_buffer_size()
        if unread or not self._idle():
            self.idle_since = now
        if not unread or unread != self.unread:
            self.unread, self.unread_since = unread, now
        if now - self.idle_since > HEAD_SECONDS or now - self.unread_since > bodies.PAUSE_SECONDS:
            self.transport.abort()  # close() would wait for the client to read
        else:
            self._look_again()


def _most() -> int:
    """Returns the most open connections, such that each could also have a file within the process's limit."""
    return min(_MOST, os.sysconf("SC_OPEN_MAX") // 3) if hasattr(os, "sysconf") else _MOST
