"""A row of a request on its way through the engine, and what it has said so far."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import AdapterpackError
from ...pack.pack import Pack
from ...runtime.adapters.mix import Mix
from ...runtime.engine.base import EngineRow
from ...runtime.engine.requests import Event
from ...runtime.generation.sampler import Choice


class Said:
    """What one row has said: ``text`` so far, its ``choices`` if it asks for log-probabilities, and how it
    ended; or the ``result`` of its one pass.
    """

    def __init__(self) -> None:
        self.text, self.tokens, self.choices = "", 0, list[Choice]()
        self.result: Mapping[str, Any] = {}
        self.reason: str | None = None
        self.error: AdapterpackError | None = None


class Outbox:
    """What the rows of a request have said, for the one who answers it. All of it happens in the server's
    loop.

    Whoever is slow to take it finds several tokens at once: nothing piles up. ``first`` and ``last`` are the
    times of tokens or results.
    """

    def __init__(self, rows: int) -> None:
        self.said = [Said() for _ in range(rows)]
        self.first = self.last = 0.0
        self.left = False
        """Whether the client has gone."""
        self._changed = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether all rows have ended."""
        return all(row.reason is not None for row in self.said)

    @property
    def error(self) -> AdapterpackError | None:
        """The first error of a row."""
        return next((row.error for row in self.said if row.error is not None), None)

    def take(self, place: int, event: Event, at: float) -> None:
        """A step of the engine gave a row a token or its result, or ended it."""
        row = self.said[place]
        if row.reason is not None:
            return
        if event.finish_reason in (None, "stop", "length"):
            row.tokens += event.result is None
            self.first, self.last = self.first or at, at
        row.text, row.reason, row.error, row.result = (
            event.text,
            event.finish_reason,
            event.error,
            event.result or {},
        )
        if event.choice is not None and event.choice.logprob is not None:
            row.choices.append(event.choice)
        self._changed.set()

    def leave(self) -> None:
        """The client has gone: nobody waits for what is said."""
        self.left = True
        self._changed.set()

    @property
    def tokens(self) -> int:
        """The tokens of all rows."""
        return sum(row.tokens for row in self.said)

    async def changed(self, seconds: float | None = None) -> bool:
        """Waits until a row has said something new, at most so long; whether one has."""
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        self._changed.clear()
        return True


@dataclass(eq=False, kw_only=True)
class Row:
    """A row that the engine is to run: how it is made, its adapter's pack, and whose it is.

    ``make`` reads the adapter, which takes time. ``cost`` is the number of its prompt's tokens, and ``place``
    the row's among those of its request, in ``outbox``. ``request`` is the engine's, once it has it.
    """

    make: Callable[[], EngineRow]
    pack: Pack | Mix | None
    cost: int
    place: int
    outbox: Outbox
    tenant: str
    share: float = 1.0
    rank: int = 0
    priority: int = 0
    request: EngineRow | None = None
    ended: bool = False
    added: float = field(default_factory=time.monotonic)
