"""The rows of requests in the scheduler's queue, and the output that they have produced so far."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import AdapterpackError
from ...pack import Pack
from ...runtime import SampledToken
from ...runtime.adapters import Mix
from ...runtime.engine import EngineRow, Event
from ..tenants import Key


class SequenceOutput:
    """The output of one row: its ``text`` so far, its ``choices`` if the request asks for log-probabilities,
    and how it ended, with the text or the token of its ``stop``; or the ``result`` of its pass. ``scored``
    are the tokens of its prompt, if the request asks for them; ``reused`` counts those of earlier rows.
    """

    def __init__(self) -> None:
        self.text, self.tokens, self.choices = "", 0, list[SampledToken]()
        self.result: Mapping[str, Any] = {}
        self.reason: str | None = None
        self.error: AdapterpackError | None = None
        self.stop: str | int | None = None
        self.scored: Sequence[SampledToken] = ()
        self.reused = 0

    @property
    def begun(self) -> bool:
        """Whether its prompt has been read."""
        return bool(self.tokens) or self.reason is not None


class RequestOutput:
    """The output of all rows of a request, for the coroutine that answers it. Only the event loop uses it.

    A slow reader gets the latest state with several tokens at once, so nothing queues up. ``first`` and
    ``last`` are the times of the first and last token or result. ``draws`` successive rows have one prompt.
    With ``whole`` the end token is among the choices, and a row that is ``silent`` answers nothing: its
    request wants to know its prompt.
    """

    def __init__(self, rows: int, draws: int = 1, whole: bool = False, silent: bool = False) -> None:
        self.sequences = [SequenceOutput() for _ in range(rows)]
        self._draws = draws
        self._whole = whole
        self._silent = silent
        self.first = self.last = 0.0
        self.left = False
        """Whether the client has disconnected."""
        self._changed = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether all rows have ended, or one of them not well."""
        reasons = {row.reason for row in self.sequences}
        return None not in reasons or not reasons.isdisjoint({"error", "cancelled"})

    @property
    def error(self) -> AdapterpackError | None:
        """The first error of a row."""
        return next((row.error for row in self.sequences if row.error is not None), None)

    def take(self, place: int, event: Event, at: float) -> None:
        """Takes an engine event for one row: a token, a result, or its end."""
        row = self.sequences[place]
        if row.reason is not None:
            return
        well = event.finish_reason in (None, "stop", "length")
        if well:
            self.first = self.first or at
            self.last = at
        row.text, row.reason, row.stop = event.text, event.finish_reason, event.stop
        row.error, row.result = event.error, event.result or {}
        row.scored, row.reused = event.scored, event.reused
        if self._silent:
            row.text, row.reason = "", "length" if well else row.reason
        elif event.sequences:
            self._take_beams(place, event)
        elif well:
            row.tokens += event.result is None
            for choice in (event.choice, event.ending if self._whole else None):
                if choice is not None and choice.logprob is not None:
                    row.choices.append(choice)
        self._changed.set()

    def _take_beams(self, place: int, event: Event) -> None:
        """Takes the sequences of a beam search, one for each row of its prompt."""
        for row, beam in zip(self.sequences[place : place + self._draws], event.sequences, strict=False):
            row.text, row.tokens, row.reason = beam.text, len(beam.ids), beam.finish_reason
            row.choices += map(SampledToken, beam.ids)
        for row in self.sequences[place : place + self._draws]:
            row.reason, row.reused = row.reason or event.finish_reason, event.reused
            row.scored = event.scored

    def leave(self) -> None:
        """Records that the client has disconnected."""
        self.left = True
        self._changed.set()

    @property
    def reused(self) -> int:
        """The tokens of the prompts that were known from earlier rows."""
        draws, rows = self._draws, self.sequences
        return sum(
            min(row.reused for row in rows[first : first + draws]) for first in range(0, len(rows), draws)
        )

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
