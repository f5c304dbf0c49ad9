"""Points with names as SVG markup: two figures of each at a glance, such as size and quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from .svg import MIN_WIDTH, WIDE, Mark, element, framed, label_column, placed, text_at, thinned
from .text import elided, text_width

_HEIGHT, _AXIS, _GAP, _LINE, _DOT = 300, 24, 8, 17, 5
_LABELS = 72
_LOG_FROM = 30
"""Values that differ by more than this factor are placed on a logarithmic scale."""
_MARGIN = 0.08
"""What is left free at either end of a scale."""


class Point(NamedTuple):
    """A point: its name, its figures and how both are written, and a tone of the palette."""

    label: str
    x: float
    y: float
    text: str
    tone: str = "c1"


class Axis(NamedTuple):
    """What an axis says, and how its values are written."""

    label: str
    shown: Callable[[float], str]


class _Scale:
    """Places on an axis between 0 and 1, and the round values that stand there."""

    def __init__(self, values: Sequence[float]) -> None:
        low, high = min(values), max(values)
        self._log = low > 0 and high > _LOG_FROM * low
        first, last = (math.log10(low), math.log10(high)) if self._log else (low, high)
        room = _MARGIN * (last - first) or 0.1 * abs(first) or 1.0
        self._first, self._last = first - room, last + room

    def place(self, value: float) -> float:
        return ((math.log10(value) if self._log else value) - self._first) / (self._last - self._first)

    def ticks(self) -> list[float]:
        if self._log:
            powers = range(math.floor(self._first), math.ceil(self._last) + 1)
            return [
                value
                for power in powers
                for value in (10.0**power, 3 * 10.0**power)
                if 0 <= self.place(value) <= 1
            ]
        span = self._last - self._first
        power = 10.0 ** math.floor(math.log10(span))
        step = next(
            power * factor for factor in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0) if span / (power * factor) <= 6
        )
        return [
            round(index * step, 12)
            for index in range(math.ceil(self._first / step), math.floor(self._last / step) + 1)
        ]


def scatter(title: str, points: Sequence[Point], x: Axis, y: Axis) -> Markup:
    """Points by two figures, each with its name next to it; names that would meet are moved apart, with a
    line to their points.

    Example:
        >>> chart = scatter("Size and error", [Point("a", 1.0, 2.0, "1, 2"), Point("b", 2.0, 1.0, "2, 1")],
        ...     Axis("size", str),
        ...                 Axis("error", str))
        >>> chart.count("<circle"), "1, 2" in chart
        (2, True)
    """
    across, up = _Scale([point.x for point in points]), _Scale([point.y for point in points])
    heights = [_LINE + _HEIGHT * (1 - up.place(point.y)) for point in points]
    rows = [
        (_LINE + _HEIGHT * (1 - up.place(value)), elided(y.shown(value), _LABELS)) for value in up.ticks()
    ]
    marks = [Mark(across.place(value), x.shown(value)) for value in across.ticks()]
    left = max(
        label_column([label for _, label in rows], _LABELS),
        math.ceil(max(text_width(mark.label) for mark in marks) / 2),
    )
    right = max(_GAP, math.ceil(max(text_width(mark.label) for mark in marks) / 2))
    plot = MIN_WIDTH - left - right
    grid = [
        element("line", {"class": "grid", "x1": "0%", "x2": "100%", "y1": height, "y2": height})
        for height, _ in rows
    ]
    grid += [text_at(label, height + 4.5, None, "end", shift=-_GAP) for height, label in rows]
    drawn = [
        _dot(point, across.place(point.x), height, moved, plot)
        for point, height, moved in zip(points, heights, _apart(points, across, heights, plot), strict=True)
    ]
    bottom = _LINE + _HEIGHT
    shown = thinned(marks, WIDE - left - right)
    always = thinned(shown, plot)
    axis = [
        text_at(mark.label, bottom + 18, mark.at, "middle", css="" if mark in always else "wide")
        for mark in shown
    ]
    axis.append(text_at(elided(x.label, plot + right), bottom + 38, 1.0, "end"))
    axis.append(text_at(elided(y.label, plot + left), 4, 0.0, "start", shift=-left))
    desc = "; ".join(f"{point.label}: {point.text}" for point in points)
    return framed(title, desc, bottom + _AXIS + 20, (left, right), [*grid, *drawn, *axis])


def _on_right(place: float) -> bool:
    return place < 0.5


def _room(place: float, plot: float) -> float:
    """The px next to a point on the side of its name, where the chart is narrowest."""
    return (1 - place if _on_right(place) else place) * plot - _DOT - _GAP


def _apart(points: Sequence[Point], across: _Scale, heights: Sequence[float], plot: float) -> list[float]:
    """The heights of the names: each is moved down or up from its point to the nearest place where no name or
    point is yet.
    """
    taken: list[tuple[float, float, float]] = []
    for point, height in zip(points, heights, strict=True):
        at = across.place(point.x) * plot
        taken.append((at - _DOT, at + _DOT, height))
    found = []
    for index, (point, height) in enumerate(zip(points, heights, strict=True)):
        place = across.place(point.x)
        width = min(text_width(point.label), _room(place, plot))
        start = place * plot + _DOT + _GAP if _on_right(place) else place * plot - _DOT - _GAP - width
        others = [one for number, one in enumerate(taken) if number != index]
        offsets = sorted(
            (step * _LINE / 2 for step in range(-2 * len(points) - 2, 2 * len(points) + 3)), key=abs
        )
        offset = next(
            (
                one
                for one in offsets
                if _LINE / 2 <= height + one <= _HEIGHT + _LINE
                and not any(
                    low < start + width and start < high and abs(height + one - other) < _LINE - 2
                    for low, high, other in others
                )
            ),
            0.0,
        )
        taken.append((start, start + width, height + offset))
        found.append(height + offset)
    return found


def _dot(point: Point, place: float, height: float, name: float, plot: float) -> Markup:
    """A point and its name: px from the point, whatever the width of the chart."""
    side = 1 if _on_right(place) else -1
    parts = [
        element(
            "circle",
            {"class": point.tone, "cx": 0, "cy": 0, "r": _DOT},
            element("title", {}, f"{point.label}: {point.text}"),
        )
    ]
    if abs(name - height) > _LINE / 2:
        parts.insert(
            0,
            element(
                "line",
                {"class": point.tone, "x1": 0, "y1": 0, "x2": side * (_DOT + _GAP - 2), "y2": name - height},
            ),
        )
    parts.append(
        element(
            "text",
            {
                "class": "value",
                "x": side * (_DOT + _GAP),
                "y": name - height + 4.5,
                "text-anchor": "start" if side > 0 else "end",
            },
            elided(point.label, _room(place, plot)),
        )
    )
    return element(
        "svg", {"x": placed(place), "y": height, "width": 1, "height": 1, "overflow": "visible"}, *parts
    )
