"""Lets requests in, as long as there is room for their rows and the server is not about to end."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from ...http.http_error import Refused
from ...runtime.engine.base import Engine
from ..tenants.keys import Key
from ..tenants.limits import Limits

_SMOOTHING = 0.1


class Gate:
    """Counts the rows that wait or run, in all and by key. ``running`` is how many run at a time; rows of one
    pass count as one. While ``draining`` it lets nobody in.
    """

    @classmethod
    def of(cls, engine: Engine, limits: Limits) -> Gate:
        """The gate before an engine."""
        return cls(limits, engine.max_rows // engine.rows_a_turn)

    def __init__(self, limits: Limits, running: int) -> None:
        self._limits, self._running = limits, running
        self._rows: Counter[str] = Counter()
        self._seconds = 1.0
        self.draining = False

    @property
    def rows(self) -> int:
        """Rows that are in."""
        return self._rows.total()

    @contextmanager
    def entered(self, key: Key, rows: int) -> Iterator[None]:
        """A request with so many rows is in, for as long as the block lasts.

        Raises:
            Refused: there are too many now (429), more than the key may ever have (400), or the server is
                about to end (503).
        """
        self.require_open()
        most = min(key.max_rows or self._limits.open_rows_a_key, self._limits.open_rows)
        if rows > most:
            raise Refused(400, "invalid_request", f"this key may have {most} answers at a time", param="n")
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
        """Checks that the server is not about to end.

        Raises:
            Refused: it is.
        """
        if self.draining:
            raise Refused(
                503, "draining", "the server is about to end", retry_after=self._limits.drain_seconds
            )

    def took(self, seconds: float) -> None:
        """A request took so long; what is told to those who are not let in follows from it."""
        self._seconds += _SMOOTHING * (seconds - self._seconds)

    def _busy(self, what: str) -> Refused:
        turns = max(1.0, self.rows / self._running)
        return Refused(
            429, "rate_limit_exceeded", what, retry_after=min(60, max(1, math.ceil(turns * self._seconds)))
        )
