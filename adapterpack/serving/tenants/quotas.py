"""How many requests and tokens a key may have in a minute and in a day, and how many it has had."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, Protocol

from ...http.http_error import HTTPError
from .keys import Key

Unit = Literal["requests", "tokens"]
_MINUTE, _DAY = 60.0, 86_400.0
_ROUNDING = 1e-6


class Meter(Protocol):
    """What a key has used of one quota. The limit is given each time: it may change while the use stays."""

    used: float

    def pass_time(self, limit: int, now: float) -> None:
        """Forgets what has been long enough ago."""

    def wait(self, limit: int, excess: float, now: float) -> float:
        """The seconds until so much less is used."""


class Bucket:
    """Use that is forgotten evenly, a limit a minute: after a pause a whole minute's worth may be used at
    once.
    """

    def __init__(self) -> None:
        self.used, self._at = 0.0, 0.0

    def pass_time(self, limit: int, now: float) -> None:
        """Forgets the use of the time since the last call."""
        self.used = max(0.0, self.used - max(0.0, now - self._at) * limit / _MINUTE)
        self._at = now

    def wait(self, limit: int, excess: float, now: float) -> float:
        """The seconds in which the limit refills by that much."""
        return excess * _MINUTE / limit


class Day:
    """Use that is forgotten at midnight, UTC."""

    def __init__(self) -> None:
        self.used, self._day = 0.0, 0.0

    def pass_time(self, limit: int, now: float) -> None:
        """Forgets all use when a new day has begun."""
        if now // _DAY > self._day:
            self.used, self._day = 0.0, now // _DAY

    def wait(self, limit: int, excess: float, now: float) -> float:
        """The seconds until midnight."""
        return _DAY - now % _DAY


class Quota(NamedTuple):
    """A quota that a key may have in its field ``name``."""

    name: str
    unit: Unit
    meter: Callable[[], Meter]
    sentence: str


QUOTAS = (
    Quota("requests_per_minute", "requests", Bucket, "requests a minute"),
    Quota("tokens_per_minute", "tokens", Bucket, "tokens a minute"),
    Quota("tokens_per_day", "tokens", Day, "tokens a day"),
)
"""All quotas."""


class QuotaUse(NamedTuple):
    """What a key has used of a quota, and how often it was refused for it."""

    key: str
    quota: str
    limit: int
    used: float
    refused: int


class Quotas:
    """What the keys have used, by their ids: it survives whatever happens to the file of keys, and ends with
    the server.

    A prompt counts before it is worked on, an answer when it has ended. So a key may go beyond its quota by
    the answers that run, and then waits the longer: over time it has what it may have. A prompt that is
    longer than a whole quota goes when nothing is used.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._meters: dict[tuple[str, str], Meter] = {}
        self._refused: Counter[tuple[str, str]] = Counter()
        self._keys: dict[str, Key] = {}
        """Those with quotas that have asked for something, as they were when they last did."""

    def ask(self, key: Key) -> None:
        """Counts a request.

        Raises:
            HTTPError: the key has no request, or no token, left.
        """
        self._require(key, requests=1, tokens=1)
        self._add(key, "requests", 1)

    def read(self, key: Key, tokens: int) -> None:
        """Counts a request's prompts.

        Raises:
            HTTPError: the key has not so many tokens left.
        """
        self._require(key, tokens=tokens)
        self._add(key, "tokens", tokens)

    def wrote(self, key: Key, tokens: int) -> None:
        """Counts a request's answers."""
        self._add(key, "tokens", tokens)

    def headers(self, key: Key) -> dict[str, str]:
        """What OpenAI's clients read of a key's quotas: of each unit the one of which least is left."""
        headers: dict[str, str] = {}
        now = self._clock()
        for unit in ("requests", "tokens"):
            limits = [
                (max(0.0, limit - meter.used), limit, meter)
                for quota, limit, meter in self._of(key)
                if quota.unit == unit
            ]
            if limits:
                left, limit, meter = min(limits, key=lambda one: one[0])
                reset = math.ceil(meter.wait(limit, meter.used, now)) if meter.used else 0
                headers |= {
                    f"x-ratelimit-limit-{unit}": str(limit),
                    f"x-ratelimit-remaining-{unit}": str(math.floor(left + _ROUNDING)),
                    f"x-ratelimit-reset-{unit}": f"{reset}s",
                }
        return headers

    def usage(self) -> list[QuotaUse]:
        """What all keys with quotas have used, those first that have used most of theirs."""
        usages = [
            QuotaUse(key.id, quota.name, limit, meter.used, self._refused[key.id, quota.name])
            for key in self._keys.values()
            for quota, limit, meter in self._of(key)
        ]
        return sorted(usages, key=lambda one: -one.used / one.limit)

    def _require(self, key: Key, **needed: int) -> None:
        """Checks that so much of each unit is left; where it is not, the quota is named for which one waits
        longest.
        """
        waits = []
        for quota, limit, meter in self._of(key):
            need = needed.get(quota.unit, 0)
            excess = meter.used + min(need, limit) - limit
            if need and excess > _ROUNDING:
                self._refused[key.id, quota.name] += 1
                what = (
                    f"this key may have {limit} {quota.sentence}: it has used {math.ceil(meter.used)}, and "
                    f"this needs {need}"
                )
                waits.append((meter.wait(limit, excess, self._clock()), what))
        if waits:
            seconds, what = max(waits)
            raise HTTPError(429, "rate_limit_exceeded", what, retry_after=math.ceil(seconds))

    def _add(self, key: Key, unit: Unit, amount: int) -> None:
        for quota, _, meter in self._of(key):
            if quota.unit == unit:
                meter.used += amount

    def _of(self, key: Key) -> Iterator[tuple[Quota, int, Meter]]:
        """The quotas of a key, with its limits and its meters as they are now."""
        for quota in QUOTAS:
            limit = getattr(key, quota.name)
            if limit is not None:
                self._keys[key.id] = key
                meter = self._meters.setdefault((key.id, quota.name), quota.meter())
                meter.pass_time(limit, self._clock())
                yield quota, limit, meter
