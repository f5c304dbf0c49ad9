"""Counts the traffic of each key, and of all keys together. Each key sees only its own counts, so none can
learn about another's traffic.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

from msgspec import Struct

from ...io import FrozenStruct
from ..scheduling import RequestOutput, ScheduledRow
from .audit import Record

MOST_KEYS = 500
"""The most keys with counts of their own; the counts of the least recently used key are dropped."""
MOST_MODELS = 2000
"""The most models with counts of their own, for each key."""
RECENT_SECONDS = 300.0
"""The period over which waiting times are reported."""
_MOST_WAITS = 400
_Key = TypeVar("_Key")
_T = TypeVar("_T")


class Wait(FrozenStruct):
    """The seconds from a request's arrival to its first token or its result, over the last five minutes: the
    number of requests, the median, and the 95th percentile.
    """

    requests: int
    p50: float
    p95: float


class Counts(Struct):
    """The number of requests that were run, and the tokens of their prompts and answers."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Tally:
    """The traffic of one key, or of all keys."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ended = Counts()
        self._models: OrderedDict[str | None, Counts] = OrderedDict()
        self._rows: dict[RequestOutput, Sequence[ScheduledRow]] = {}
        """The requests whose rows are queued or running."""
        self._waits: deque[tuple[float, float]] = deque(maxlen=_MOST_WAITS)

    @property
    def counts(self) -> Counts:
        """All counts so far, including tokens of answers that are still being generated."""
        ended = self._ended
        return Counts(
            ended.requests,
            ended.prompt_tokens,
            ended.completion_tokens + sum(output.tokens for output in self._rows),
        )

    @property
    def running(self) -> int:
        """The number of rows in the engine."""
        return sum(row.request is not None and not row.ended for row in chain(*self._rows.values()))

    @property
    def waiting(self) -> int:
        """The number of rows that wait for the engine."""
        return sum(row.request is None and not row.ended for row in chain(*self._rows.values()))

    @property
    def wait(self) -> Wait | None:
        """The waiting times of recent requests, or None if there were none."""
        since = self._clock() - RECENT_SECONDS
        seconds = sorted(wait for at, wait in self._waits if at >= since)
        return Wait(len(seconds), _percentile(seconds, 50), _percentile(seconds, 95)) if seconds else None

    def of(self, adapter: str | None) -> Counts:
        """Returns the counts of an adapter, or of the base. Requests count once they have ended."""
        return self._models.get(adapter, Counts())

    def begin(self, output: RequestOutput, rows: Sequence[ScheduledRow], prompt_tokens: int) -> None:
        """Records that a request has begun."""
        self._rows[output] = rows
        self._ended.requests += 1
        self._ended.prompt_tokens += prompt_tokens

    def end(self, output: RequestOutput, record: Record) -> None:
        """Records that a request has ended."""
        del self._rows[output]
        self._ended.completion_tokens += output.tokens
        if not record.mixed:  # mixes have no lasting name
            counts = _recent(self._models, record.adapter, Counts, MOST_MODELS)
            counts.requests += 1
            counts.prompt_tokens += record.prompt_tokens
            counts.completion_tokens += output.tokens
        if output.first:
            self._waits.append((self._clock(), output.first - record.started))


class Traffic:
    """The traffic of all keys, by key id. Only the server's event loop uses it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._keys: OrderedDict[str, Tally] = OrderedDict()
        self.all = Tally(clock)

    def of(self, key: str) -> Tally:
        """Returns the tally of a key."""
        return _recent(self._keys, key, lambda: Tally(self.clock), MOST_KEYS)

    @contextmanager
    def count(
        self, key: str, record: Record, rows: Sequence[ScheduledRow], output: RequestOutput
    ) -> Iterator[None]:
        """Counts a request's rows for as long as the block lasts."""
        tallies = self.of(key), self.all
        for tally in tallies:
            tally.begin(output, rows, record.prompt_tokens)
        try:
            yield
        finally:
            for tally in tallies:
                tally.end(output, record)


def _recent(values: OrderedDict[_Key, _T], key: _Key, make: Callable[[], _T], most: int) -> _T:
    """Returns the value of a key and marks it as the most recent; drops the oldest values if there are too
    many.
    """
    if key not in values:
        values[key] = make()
    values.move_to_end(key)
    while len(values) > most:
        values.popitem(last=False)
    return values[key]


def _percentile(ordered: Sequence[float], percent: int) -> float:
    """Returns the smallest value that ``percent`` of 100 values do not exceed."""
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]
