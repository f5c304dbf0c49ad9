"""Admits requests while there is room for their rows and the server is not shutting down."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from ...http import HTTPError, invalid_request
from ...runtime import Engine
from ..tenants import Key, ServerLimits

_SMOOTHING = 0.1


class Admission:
    """Counts the rows that wait or run, in total and for each key. ``running`` is the number of rows that run
    at a time; the rows of one encoder pass count as one. While ``draining`` it admits nothing.
    """

    @classmethod
    def of(cls, engine: Engine, limits: ServerLimits) -> Admission:
        """Makes the admission for an engine."""
        return cls(limits, engine.max_rows // engine.rows_a_turn)

    def __init__(self, limits: ServerLimits, running: int) -> None:
        self._limits, self._running = limits, running
        self._rows: Counter[str] = Counter()
        self._seconds = 1.0
        self.draining = False

    @property
    def rows(self) -> int:
        """The rows that were admitted and have not ended."""
        return self._rows.total()

    @contextmanager
    def admit(self, key: Key, rows: int) -> Iterator[None]:
        """Admits a request with that many rows for as long as the block lasts.

        Raises:
            HTTPError: too many rows wait now (429), the request exceeds the key's limit (400), or the server
                is shutting down (503).
        """
        self.require_open()
        most = min(key.max_rows or self._limits.open_rows_a_key, self._limits.open_rows)
        if rows > most:
            raise invalid_request(f"this key may have at most {most} answers at a time", "n")
        if self._rows[key.id] + rows > most:
            raise self._busy("this key has too many requests at a time")
        if self.rows + rows > self._limits.open_rows:
            raise self._busy("too many requests wait")
        self._rows[key.id] += rows
        try:
            yield
        finally:
            self._rows[key.id] -= rows
            if not self._rows[key.id]:
                del self._rows[key.id]

    def require_open(self) -> None:
        """Checks that the server is not shutting down.

        Raises:
            HTTPError: the server is shutting down.
        """
        if self.draining:
            raise HTTPError(
                503, "draining", "the server is about to end", retry_after=self._limits.drain_seconds
            )

    def note_time(self, seconds: float) -> None:
        """Records how long a request took, to estimate ``Retry-After`` for refused ones."""
        self._seconds += _SMOOTHING * (seconds - self._seconds)

    def _busy(self, what: str) -> HTTPError:
        turns = max(1.0, self.rows / self._running)
        return HTTPError(
            429, "rate_limit_exceeded", what, retry_after=min(60, max(1, math.ceil(turns * self._seconds)))
        )
