"""The rows of requests in the scheduler's queue, and the output that they have produced so far."""

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
from ...runtime.generation.sampler import SampledToken
from ..tenants.keys import Key


class SequenceOutput:
    """The output of one row: its ``text`` so far, its ``choices`` if the request asks for log-probabilities,
    and how it ended; or the ``result`` of its pass.
    """

    def __init__(self) -> None:
        self.text, self.tokens, self.choices = "", 0, list[SampledToken]()
        self.result: Mapping[str, Any] = {}
        self.reason: str | None = None
        self.error: AdapterpackError | None = None


class RequestOutput:
    """The output of all rows of a request, for the coroutine that answers it. Only the event loop uses it.

    A slow reader gets the latest state with several tokens at once, so nothing queues up. ``first`` and
    ``last`` are the times of the first and last token or result.
    """

    def __init__(self, rows: int) -> None:
        self.sequences = [SequenceOutput() for _ in range(rows)]
        self.first = self.last = 0.0
        self.left = False
        """Whether the client has disconnected."""
        self._changed = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether all rows have ended."""
        return all(row.reason is not None for row in self.sequences)

    @property
    def error(self) -> AdapterpackError | None:
        """The first error of a row."""
        return next((row.error for row in self.sequences if row.error is not None), None)

    def take(self, place: int, event: Event, at: float) -> None:
        """Takes an engine event for one row: a token, a result, or its end."""
        row = self.sequences[place]
        if row.reason is not None:
            return
        if event.finish_reason in (None, "stop", "length"):
            row.tokens += event.result is None
            self.first, self.last = self.first or at, at
        row.text, row.reason = event.text, event.finish_reason
        row.error, row.result = event.error, event.result or {}
        if event.choice is not None and event.choice.logprob is not None:
            row.choices.append(event.choice)
        self._changed.set()

    def leave(self) -> None:
        """Records that the client has disconnected."""
        self.left = True
        self._changed.set()

    @property
    def tokens(self) -> int:
        """The number of tokens of all rows."""
        return sum(row.tokens for row in self.sequences)

    async def wait(self, seconds: float | None = None) -> bool:
        """Waits until a row has new output, at most ``seconds``, and returns whether there is any."""
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        self._changed.clear()
        return True


@dataclass(eq=False, kw_only=True)
class ScheduledRow:
    """A row that waits for the engine or runs on it.

    ``make`` creates the engine's request; it reads the adapter, which takes time. ``cost`` is the number of
    prompt tokens; ``place`` is its index in ``output``. ``request`` is the engine's request, once the engine
    has it.
    """

    make: Callable[[], EngineRow]
    pack: Pack | Mix | None
    cost: int
    place: int
    output: RequestOutput
    key: Key
    priority: int = 0
    request: EngineRow | None = None
    ended: bool = False
    added: float = field(default_factory=time.monotonic)
