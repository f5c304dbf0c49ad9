"""Closes connections on which no request arrives in time, so that a client cannot use them all up."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_SECONDS = 20.0


class Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """HTTP as uvicorn speaks it, where the head of a request has to be whole some seconds after the connection can take one."""

    deadline: Any = None

    def connection_made(self, transport: Any) -> None:
        """Starts the time for the first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Starts the time for the next request, or ends it."""
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        if self._idle():
            self.deadline = self.deadline or self.loop.call_later(HEAD_SECONDS, self._expired)
        elif self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    def _expired(self) -> None:
        self.deadline = None
        if self._idle():
            self.transport.close()

    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete
