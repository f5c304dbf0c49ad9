"""Draws the only kind of chart: lines over numbered steps, which ``parts.html.jinja`` renders as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Points = Sequence[tuple[int, float]]
"""The number of each step, and its value."""
TONES = ("c1", "c2", "c3")
"""The palette tones that distinguish lines: a chart has at most three lines."""
_POINTS = 200
"""The most points of a line: more are indistinguishable."""
_DECADES = 4
"""Decades of a logarithmic scale, from 1 downwards."""


class Chart(NamedTuple):
    """A chart as the template draws it. ``ticks`` are labels and their distances from the top, in percent;
    ``lines`` labels, tones and points of polylines; ``ends`` the first and the last step.
    """

    title: str
    text: str
    ticks: list[tuple[str, float]]
    lines: list[tuple[str, str, str]]
    ends: tuple[int, int]


def line_charts(title: str, lines: Mapping[str, Points], *, log: bool = False) -> list[Chart]:
    """Draws lines, three in a chart; ``log`` takes a logarithmic scale from 1 down to 1e-4.

    A point of a long line is the mean of neighbouring steps.

    Example:
        >>> [chart] = line_charts("Loss", {"tickets": [(1, 2.0), (2, 1.0), (3, 0.5)]})
        >>> chart.lines, chart.text, chart.ends
        ([('tickets', 'c1', '0,0 50,50 100,75')], 'tickets: from 2 to 0.5', (1, 3))
    """
    finite = {
        label: [(step, value) for step, value in points if math.isfinite(value)]
        for label, points in lines.items()
    }
    named = [(label, points) for label, points in finite.items() if points]
    groups = [named[start : start + len(TONES)] for start in range(0, len(named), len(TONES))]
    return [_line_chart(title, group, log) for group in groups]


def _line_chart(title: str, lines: Sequence[tuple[str, Points]], log: bool) -> Chart:
    short = [shorten(points) for _, points in lines]
    values = [value for points in short for _, value in points]
    steps = [step for points in short for step, _ in points]
    first = min(steps)
    last = max(steps)
    low = min(0.0, *values)
    high = max(0.0, *values)

    def place(value: float) -> float:
        """Where a value lies, in percent from the top."""
        if log:
            return 100 * min(1.0, abs(math.log10(max(value, 10.0**-_DECADES))) / _DECADES)
        return 100 * (high - value) / ((high - low) or 1.0)

    ticks = [10.0**-power for power in range(_DECADES + 1)] if log else round_steps(low, high)
    drawn = [
        " ".join(
            f"{100 * (step - first) / ((last - first) or 1):.4g},{place(value):.4g}" for step, value in points
        )
        for points in short
    ]
    return Chart(
        f"{title} of {', '.join(label for label, _ in lines)}",
        "; ".join(f"{label}: from {points[0][1]:.3g} to {points[-1][1]:.3g}" for label, points in lines),
        [(f"{value:.3g}", place(value)) for value in ticks],
        [(label, tone, line) for (label, _), tone, line in zip(lines, TONES, drawn, strict=False)],
        (first, last),
    )


def shorten(points: Points) -> Points:
    """Returns at most 200 points: the mean value of neighbouring steps at the last of them."""
    size = math.ceil(len(points) / _POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [(part[-1][0], math.fsum(value for _, value in part) / len(part)) for part in parts]


def round_steps(low: float, high: float) -> list[float]:
    """Returns the multiples of 1, 2 or 5 times a power of ten between the two: three to eleven.

    Example:
        >>> round_steps(0.0, 2.3), round_steps(-1.0, 0.0)
        ([0.0, 0.5, 1.0, 1.5, 2.0], [-1.0, -0.8, -0.6, -0.4, -0.2, 0.0])
    """
    whole = high - low
    if whole <= 0:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(whole))
    step = next(power * factor for factor in (0.2, 0.5, 1.0, 2.0) if whole / (power * factor) <= 5)
    return [round(step * at, 12) for at in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]
