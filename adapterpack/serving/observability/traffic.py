"""What each key has had so far and what runs for it now, kept apart, so that no key can learn of another's;
and the same of all keys.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from ..scheduling.rows import RequestOutput, ScheduledRow
from .audit import Record

MOST_KEYS = 500
"""Keys with figures of their own; the one that has been away longest begins anew."""
MOST_MODELS = 2000
"""Models of a key with counts of their own."""
RECENT_SECONDS = 300.0
"""How far back waiting times go."""
_MOST_WAITS = 400
_Key = TypeVar("_Key")
_T = TypeVar("_T")


class Wait(msgspec.Struct, frozen=True):
    """The seconds from a request's arrival to its first token, or to its result, over the last five minutes:
    how many requests, the middle one, and the one that 95 of 100 do not exceed.
    """

    requests: int
    p50: float
    p95: float


class Counts(msgspec.Struct):
    """Requests that were worked on, and the tokens of their prompts and answers."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(eq=False)
class _Work:
    """A request whose rows are in."""

    rows: Sequence[ScheduledRow]
    output: RequestOutput


class Tally:
    """The traffic of one key, or of all."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ended = Counts()
        self._models: OrderedDict[str | None, Counts] = OrderedDict()
        self._work: set[_Work] = set()
        self._waits: deque[tuple[float, float]] = deque(maxlen=_MOST_WAITS)

    @property
    def counts(self) -> Counts:
        """All so far, tokens of answers that still run included."""
        ended = self._ended
        return Counts(
            ended.requests,
            ended.prompt_tokens,
            ended.completion_tokens + sum(work.output.tokens for work in self._work),
        )

    @property
    def running(self) -> int:
        """Rows that the engine has."""
        return sum(row.request is not None and not row.ended for work in self._work for row in work.rows)

    @property
    def waiting(self) -> int:
        """Rows that it has not."""
        return sum(row.request is None and not row.ended for work in self._work for row in work.rows)

    @property
    def wait(self) -> Wait | None:
        """How long requests waited lately; None where there were none."""
        since = self._clock() - RECENT_SECONDS
        seconds = sorted(wait for at, wait in self._waits if at >= since)
        return Wait(len(seconds), _percentile(seconds, 50), _percentile(seconds, 95)) if seconds else None

    def of(self, adapter: str | None) -> Counts:
        """What requests for an adapter, or for the base, have had; they count when they end."""
        return self._models.get(adapter, Counts())

    def begin(self, work: _Work, prompt_tokens: int) -> None:
        """A request's rows are in."""
        self._work.add(work)
        self._ended.requests += 1
        self._ended.prompt_tokens += prompt_tokens

    def end(self, work: _Work, record: Record) -> None:
        """They have ended."""
        self._work.discard(work)
        tokens = work.output.tokens
        self._ended.completion_tokens += tokens
        if not record.mixed:  # what requests put together has no name that lasts
            counts = _recent(self._models, record.adapter, Counts, MOST_MODELS)
            counts.requests += 1
            counts.prompt_tokens += record.prompt_tokens
            counts.completion_tokens += tokens
        if work.output.first:
            self._waits.append((self._clock(), work.output.first - record.started))


class Traffic:
    """The traffic of a server's keys, by their ids. All of it happens in the server's loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._keys: OrderedDict[str, Tally] = OrderedDict()
        self.all = Tally(clock)

    def of(self, key: str) -> Tally:
        """A key's own."""
        return _recent(self._keys, key, lambda: Tally(self.clock), MOST_KEYS)

    @contextmanager
    def count(
        self, key: str, record: Record, rows: Sequence[ScheduledRow], output: RequestOutput
    ) -> Iterator[None]:
        """A request's rows are in, for as long as the block lasts."""
        work, tallies = _Work(rows, output), (self.of(key), self.all)
        for tally in tallies:
            tally.begin(work, record.prompt_tokens)
        try:
            yield
        finally:
            for tally in tallies:
                tally.end(work, record)


def _recent(values: OrderedDict[_Key, _T], key: _Key, make: Callable[[], _T], most: int) -> _T:
    """The value of a key, which now is the most recent one; the oldest go where there are too many."""
    if key not in values:
        values[key] = make()
    values.move_to_end(key)
    while len(values) > most:
        values.popitem(last=False)
    return values[key]


def _percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest number that so many percent of them do not exceed."""
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]
