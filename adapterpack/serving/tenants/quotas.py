"""Quotas: how many requests and tokens a key may use in a minute and a day, and how many it has used."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

from ...http import HTTPError
from .keys import Key

Unit = Literal["requests", "tokens"]
_MINUTE, _DAY = 60.0, 86_400.0
_ROUNDING = 1e-6


class Bucket:
    """The use of a quota for each minute: a token bucket that refills at the limit, so that after a pause a
    full minute's worth may be used at once. The limit is passed on each call, since it may change while the
    use remains.
    """

    def __init__(self) -> None:
        self.used, self._at = 0.0, 0.0

    def pass_time(self, limit: int, now: float) -> None:
        """Drops the use that the time since the last call refills."""
        self.used = max(0.0, self.used - max(0.0, now - self._at) * limit / _MINUTE)
        self._at = now

    def wait(self, limit: int, excess: float, now: float) -> float:
        """Returns the seconds until the use has dropped by ``excess``."""
        return excess * _MINUTE / limit


class Day(Bucket):
    """The use of a quota for each day, which is dropped at midnight, UTC."""

    def pass_time(self, limit: int, now: float) -> None:
        """Drops all use if a new day has begun."""
        if now // _DAY > self._at // _DAY:
            self.used = 0.0
            self._at = now

    def wait(self, limit: int, excess: float, now: float) -> float:
        """Returns the seconds until midnight."""
        return _DAY - now % _DAY


QUOTAS: Mapping[str, type[Bucket]] = {
    "requests_per_minute": Bucket,
    "tokens_per_minute": Bucket,
    "tokens_per_day": Day,
}
"""Field of a key -> how its use is counted. The field's name begins with the unit."""


class QuotaUse(NamedTuple):
    """The use of a quota by a key, and how often the key was refused because of it."""

    key: str
    quota: str
    limit: int
    used: float
    refused: int


class Quotas:
    """The use of all quotas, by key id. It survives changes of the file of keys, and ends with the server.

    A prompt is charged before it runs, an answer when it has ended. A key can thus exceed its quota by its
    running answers, and then waits longer, so that the rate holds over time. A prompt longer than a complete
    quota runs when nothing is used.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._meters: dict[tuple[str, str], Bucket] = {}
        self._refused: Counter[tuple[str, str]] = Counter()
        self._keys: dict[str, Key] = {}
        """The keys with quotas that have sent requests, as of their last request."""

    def ask(self, key: Key) -> None:
        """Charges a request.

        Raises:
            HTTPError: the key has no requests or tokens left.
        """
        self._require(key, requests=1, tokens=1)
        self._add(key, "requests", 1)

    def charge_prompt(self, key: Key, tokens: int) -> None:
        """Charges the prompts of a request.

        Raises:
            HTTPError: the key has too few tokens left.
        """
        self._require(key, tokens=tokens)
        self._add(key, "tokens", tokens)

    def charge_answer(self, key: Key, tokens: int) -> None:
        """Charges the answers of a request."""
        self._add(key, "tokens", tokens)

    def headers(self, key: Key) -> dict[str, str]:
        """Returns the rate limit headers of OpenAI's API. For each unit they describe the quota with the
        least left.
        """
        headers: dict[str, str] = {}
        now = self._clock()
        for unit in ("requests", "tokens"):
            limits = [
                (max(0.0, limit - meter.used), limit, meter)
                for quota, limit, meter in self._of(key)
                if quota.startswith(unit)
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
        """Returns the use of all quotas, the highest share first."""
        usages = [
            QuotaUse(key.id, quota, limit, meter.used, self._refused[key.id, quota])
            for key in self._keys.values()
            for quota, limit, meter in self._of(key)
        ]
        return sorted(usages, key=lambda one: -one.used / one.limit)

    def _require(self, key: Key, **needed: int) -> None:
        """Checks that so much of each unit is left. The error names the quota with the longest wait."""
        waits = []
        for quota, limit, meter in self._of(key):
            need = needed.get(quota.partition("_")[0], 0)
            # min: a prompt longer than the complete quota may run once nothing is used.
            excess = meter.used + min(need, limit) - limit
            if need and excess > _ROUNDING:
                self._refused[key.id, quota] += 1
                what = (
                    f"this key may have at most {limit} {quota.replace('_per_', ' a ')}: it has used "
                    f"{math.ceil(meter.used)}, and this needs {need}"
                )
                waits.append((meter.wait(limit, excess, self._clock()), what))
        if waits:
            seconds, what = max(waits)
            raise HTTPError(429, "rate_limit_exceeded", what, retry_after=math.ceil(seconds))

    def _add(self, key: Key, unit: Unit, amount: int) -> None:
        for quota, _, meter in self._of(key):
            if quota.startswith(unit):
                meter.used += amount

    def _of(self, key: Key) -> Iterator[tuple[str, int, Bucket]]:
        """Yields the quotas of a key, with its limits and current meters."""
        for quota, kind in QUOTAS.items():
            limit = getattr(key, quota)
            if limit is not None:
                self._keys[key.id] = key
                meter = self._meters.setdefault((key.id, quota), kind())
                meter.pass_time(limit, self._clock())
                yield quota, limit, meter
