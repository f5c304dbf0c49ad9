"""Formats numbers for people (sizes, shares, times, tables, what is left to do); values that were not
measured show as n/a.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MISSING = "n/a"
_SECONDS = 2.0
"""Seconds between two messages of progress."""
_MOST_NESTED = 8
"""The most nested entries that are shown in one place; more are counted."""


def number(value: object) -> float | None:
    """Returns the value as a finite float, or None if it is missing or not a number.

    Example:
        >>> number(2), number(True), number(float("nan")), number(None)
        (2.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def figure(value: object, form: str = ".3g") -> str:
    """Formats a number, by default with three digits.

    Example:
        >>> figure(0.12345), figure(2, ".1f"), figure(None)
        ('0.123', '2.0', 'n/a')
    """
    known = number(value)
    return MISSING if known is None else format(known, form)


def percent(value: object) -> str:
    """Formats a share between 0 and 1 as a percentage with one decimal.

    Example:
        >>> percent(0.167), percent(None)
        ('16.7 %', 'n/a')
    """
    share = number(value)
    return MISSING if share is None else f"{100 * share:.1f} %"


def small(value: object) -> str:
    """Formats a difference with two digits and a power of ten; zero is shown as exact.

    Example:
        >>> small(1.04e-6), small(0.0)
        ('1.0e-06', '0')
    """
    difference = number(value)
    if difference is None:
        return MISSING
    return f"{difference:.1e}" if difference else "0"


def size(value: object) -> str:
    """Formats bytes in decimal units with three digits.

    Example:
        >>> size(90868376), size(400_000), size(1_300_000), size(999_999), size(12)
        ('90.9 MB', '400 kB', '1.30 MB', '1.00 MB', '12 B')
    """
    count = number(value)
    if count is None:
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        # 999.5 of a unit would be printed as 1000 of it.
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{_three(count)} {unit}"
        count /= 1000
    return f"{_three(count)} TB"


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Formats rows of cells as lines with aligned columns.

    Example:
        >>> print(align_columns([("rows", "tokens"), ("1,200", "7")]))
        rows   tokens
        1,200  7
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _three(value: float) -> str:
    """Formats a number with three digits."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def seconds(value: object) -> str:
    """Formats a duration, in minutes from two minutes on.

    Example:
        >>> seconds(1.234), seconds(30.1), seconds(125), seconds(0.004)
        ('1.2 s', '30.1 s', '2 min 5 s', '< 0.1 s')
    """
    duration = number(value)
    if duration is None:
        return MISSING
    if 0 < duration < 0.05:
        return "< 0.1 s"
    if duration < 119.95:
        return f"{duration:.1f} s"
    minutes, rest = divmod(round(duration), 60)
    return f"{minutes} min {rest} s"


def count(value: object) -> str:
    """Formats a whole number with separators, or in millions from one million on.

    Example:
        >>> count(300_000), count(22_713_216), count(1_234_000_000)
        ('300,000', '22.7 million', '1.23 billion')
    """
    whole = number(value)
    if whole is None:
        return MISSING
    if whole < 999_950:
        return f"{whole:,.0f}"
    return f"{_three(whole / 1e9)} billion" if whole >= 999.5e6 else f"{_three(whole / 1e6)} million"


def things(number: int, one: str, many: str | None = None) -> str:
    """Formats a number of things, in the singular for one; ``many`` is the plural if it is not ``one`` with
    an s.

    Example:
        >>> things(1, "row"), things(1200, "row"), things(0, "entry", "entries")
        ('1 row', '1,200 rows', '0 entries')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def show_value(value: Any) -> str:
    """Formats any JSON value for people.

    Example:
        >>> show_value({"rank": 8, "labels": ["a", "b"], "scale": 0.125, "lineage": None, "canary": True})
        'rank: 8, labels: a b, scale: 0.125, lineage: none, canary: yes'
        >>> # a long table in one place is counted
        >>> show_value({"tensors": [[f"layers.{number}", [4, 4]] for number in range(40)]})
        'tensors: 40 entries'
    """
    if value is None or (isinstance(value, Mapping | list | tuple) and not value):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{str(key).replace('_', ' ')}: {_show_nested(item)}" for key, item in value.items())
    if (
        isinstance(value, list | tuple)
        and len(value) > _MOST_NESTED
        and any(isinstance(item, Mapping | list | tuple) for item in value)
    ):
        return things(len(value), "entry", "entries")
    return " ".join(map(show_value, value)) if isinstance(value, list | tuple) else str(value)


def _show_nested(value: Any) -> str:
    return f"({show_value(value)})" if isinstance(value, Mapping) and value else show_value(value)


def stretches(count: int, most: int) -> list[tuple[int, int]]:
    """Divides ``count`` values into at most ``most`` stretches of nearly equal length; returns the start and
    end of each.

    Example:
        >>> stretches(5, 2), stretches(2, 8)
        ([(0, 2), (2, 5)], [(0, 1), (1, 2)])
    """
    parts = min(count, most)
    return [(round(index * count / parts), round((index + 1) * count / parts)) for index in range(parts)]


class StepCounter:
    """Says how many of ``total`` steps are done, and when the rest will be."""

    def __init__(self, total: int, say: Callable[[str], None], what: str = "prove") -> None:
        self._total = total
        self._say = say
        self._what = what
        self._done = 0
        self._started = self._said = time.monotonic()

    def tick(self) -> None:
        """Counts a step, and says so, if the last message is some seconds old."""
        self._done += 1
        now = time.monotonic()
        if now - self._said >= _SECONDS and self._done < self._total:
            self._said = now
            left = (now - self._started) / self._done * (self._total - self._done)
            self._say(f"{self._what}: {self._done} of {self._total} steps, about {left:.0f} s left")
