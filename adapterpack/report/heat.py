"""Heat maps as SVG markup: many numbers at a glance, each to be read when it is pointed at.

A colour has two directions, for values above and below zero, and the strength of the value; so it reads in
light, in dark and on paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from .svg import MIN_WIDTH, WIDE, Mark, element, framed, label_column, placed, text_at, thinned
from .text import elided, text_width

_ROW, _AXIS, _GAP, _LABELS = 22, 24, 8, 210
_FAINTEST = 0.06
Matrix = Sequence[Sequence[float | None]]


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Matrix,
    *,
    high: float = 1.0,
    middle: float = 0.0,
    shown: Callable[[float], str] = lambda value: f"{value:z.2f}",
    written: bool = False,
    tones: tuple[str, str] = ("c1", "c2"),
) -> Markup:
    """Cells of ``values`` ``[rows][columns]``: the colour is full at ``high`` (or as far below ``middle``);
    None leaves a gap.

    ``tones`` are those from ``middle`` on and below it. ``written`` writes the value into its cell, where
    there is room for it.

    Example:
        >>> chart = heat_map("Cosine", ["a", "b"], ["1", "2"], [[1.0, -0.5], [None, 1.0]])
        >>> chart.count("<rect"), 'class="cell c2"' in chart, "<title>a, 2: -0.50</title>" in chart
        (3, True, True)
    """
    overhang = math.ceil(max(map(text_width, columns), default=0.0) / 2)
    left, right = max(label_column(rows, _LABELS), overhang), max(_GAP, overhang)
    width = 1 / max(1, len(columns))
    room = (MIN_WIDTH - left - right) * width
    parts: list[Markup] = []
    for index, (row, line) in enumerate(zip(rows, values, strict=True)):
        y = index * _ROW
        parts.append(text_at(elided(row, left - _GAP), y + _ROW / 2 + 4.5, None, "end", shift=-_GAP))
        for at, (column, value) in enumerate(zip(columns, line, strict=True)):
            if value is None or not math.isfinite(value):
                continue
            strength = min(1.0, abs(value - middle) / abs(high - middle)) if high != middle else 0.0
            cell = {
                "class": f"cell {tones[0] if value >= middle else tones[1]}",
                "x": placed(at * width),
                "y": y,
                "width": placed(width),
                "height": _ROW,
                "fill-opacity": f"{_FAINTEST + (1 - _FAINTEST) * strength:.3g}",
            }
            parts.append(element("rect", cell, element("title", {}, f"{row}, {column}: {shown(value)}")))
            if written and text_width(shown(value)) <= room:
                css = "on" if strength > 0.55 else "off"
                parts.append(text_at(shown(value), y + _ROW / 2 + 4.5, (at + 0.5) * width, "middle", css=css))
    marks = [Mark((at + 0.5) * width, column) for at, column in enumerate(columns)]
    shown_marks = thinned(marks, WIDE - left - right)
    always = thinned(shown_marks, MIN_WIDTH - left - right)
    bottom = len(rows) * _ROW
    axis = [
        text_at(mark.label, bottom + 16, mark.at, "middle", css="" if mark in always else "wide")
        for mark in shown_marks
    ]
    return framed(
        title, _described(rows, columns, values, shown), bottom + _AXIS, (left, right), [*parts, *axis]
    )


def _described(
    rows: Sequence[str], columns: Sequence[str], values: Matrix, shown: Callable[[float], str]
) -> str:
    """The range of each row in words: a map of hundreds of cells is no text."""
    ranges = []
    for row, line in zip(rows, values, strict=True):
        finite = [
            (value, column)
            for value, column in zip(line, columns, strict=True)
            if value is not None and math.isfinite(value)
        ]
        if finite:
            (low, first), (high, last) = min(finite), max(finite)
            ranges.append(f"{row}: from {shown(low)} ({first}) to {shown(high)} ({last})")
    return ". ".join(ranges)
