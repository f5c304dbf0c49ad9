"""Charts as SVG markup, by small pure functions: grouped bars, stages in time, sizes.

A chart is as wide as its column and its text keeps its size: lengths along x are percentages of the plot,
while the columns for labels (left) and values (right) are padding in px around it. ``overflow: visible`` lets
text stand in that padding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple
from zlib import crc32

from markupsafe import Markup

from ..io.readable import MISSING, seconds, size
from .text import elided, escaped, text_width

MIN_WIDTH = 320
"""The narrowest chart, in px, in which no text is clipped."""
WIDE = 600
"""From this width on, in px, the axis may have more labels; the style sheet hides them below it."""
LABELS_AT_MOST, VALUES_AT_MOST = 162, 116
_GAP, _ROW, _BAR, _AXIS, _SPACE = 8, 24, 14, 22, 12
_LOG_FROM = 30
"""Sizes that differ by more than this factor are drawn on a logarithmic scale: the smallest would be a
hairline on a linear one.
"""


class Bar(NamedTuple):
    """One bar: its label, its value (None: not measured), the value as text, and a tone of the palette."""

    label: str
    value: float | None
    text: str
    tone: str = "c1"


class Reference(NamedTuple):
    """A line to compare with, such as the level of chance."""

    label: str
    value: float


class Group(NamedTuple):
    """Bars under one heading; an empty label gives no heading."""

    label: str
    bars: Sequence[Bar]
    reference: Reference | None = None


class _Span(NamedTuple):
    """A bar by its two ends, as fractions of the plot."""

    label: str
    start: float
    stop: float
    text: str
    tone: str


class Mark(NamedTuple):
    """A place on the axis, as a fraction of the plot."""

    at: float
    label: str


class _Block(NamedTuple):
    label: str
    spans: Sequence[_Span]
    reference: Mark | None = None


def grouped_bars(
    title: str, groups: Sequence[Group], *, maximum: float, ticks: Sequence[tuple[float, str]] = ()
) -> Markup:
    """Horizontal bars from 0 to ``maximum``, in groups, each with its value and, if the group has one, a
    dashed reference line.

    Values out of range are drawn at the nearer end; the text next to the bar has the value. ``ticks`` are
    (value, label).

    Example:
        >>> chart = grouped_bars("Accuracy", [Group("tickets", [Bar("PyTorch", 0.88, "88.0 %")],
        ...     Reference("chance", 0.167))], maximum=1)
        >>> 'width="88%"' in chart, "chance" in chart
        (True, True)
    """
    blocks = [
        _Block(
            group.label,
            [_Span(bar.label, 0.0, _fraction(bar.value, maximum), bar.text, bar.tone) for bar in group.bars],
            group.reference and Mark(_fraction(group.reference.value, maximum), group.reference.label),
        )
        for group in groups
    ]
    described = (
        (
            group.label,
            [
                *([group.reference.label] if group.reference else []),
                *(f"{bar.label} {bar.text}" for bar in group.bars),
            ],
        )
        for group in groups
    )
    desc = ". ".join(
        f"{label}: {', '.join(parts)}" if label else ", ".join(parts) for label, parts in described
    )
    return _chart(title, desc, blocks, [Mark(_fraction(value, maximum), label) for value, label in ticks])


def time_bars(title: str, stages: Sequence[tuple[str, float]], tone: str = "c1") -> Markup:
    """Stages in seconds, in order: each bar starts where the one before it ends.

    Example:
        >>> chart = time_bars("Time", [("fetch", 1.0), ("train", 3.0)])
        >>> '<rect class="c1" x="25%"' in chart, "3.0 s" in chart
        (True, True)
    """
    lengths = [max(0.0, duration) for _, duration in stages]
    total = math.fsum(lengths)
    spans, start = [], 0.0
    for (label, duration), length in zip(stages, lengths, strict=True):
        spans.append(
            _Span(label, _fraction(start, total), _fraction(start + length, total), seconds(duration), tone)
        )
        start += length
    desc = ", ".join(f"{span.label} {span.text}" for span in spans) + f"; together {seconds(total)}"
    return _chart(
        title,
        desc,
        [_Block("", spans)],
        [Mark(_fraction(at, total), f"{at:g} s") for at in steps_below(total)],
    )


def size_bars(
    title: str, sizes: Sequence[tuple[str, float]], *, log: bool | None = None, tones: Sequence[str] = ()
) -> Markup:
    """Sizes in bytes; ``log`` None takes a logarithmic scale where the largest is more than 30 times the
    smallest.

    Example:
        >>> chart = size_bars("Sizes", [("base", 90e6), ("pack", 1.3e6)])
        >>> "logarithmic" in chart, "1.30 MB" in chart
        (True, True)
    """
    positive = [value for _, value in sizes if value > 0]
    low, high = (min(positive), max(positive)) if positive else (1.0, 1.0)
    if log is None:
        log = high > _LOG_FROM * low
    if log:
        # A little room below the smallest, so that its bar is seen.
        floor = math.log10(low) - 0.3
        steps = [10.0**power for power in range(math.ceil(floor), math.floor(math.log10(high)) + 1)]
    else:
        floor, steps = 0.0, steps_below(high)

    def place(value: float) -> float:
        if not log:
            return _fraction(value, high)
        return _fraction(math.log10(value) - floor, math.log10(high) - floor) if value > 0 else 0.0

    marks = [Mark(place(value), re.sub(r"\.0+(?= )", "", size(value))) for value in steps]
    tones = tones or ["c1"] * len(sizes)
    spans = [
        _Span(label, 0.0, place(value), size(value), tone)
        for (label, value), tone in zip(sizes, tones, strict=True)
    ]
    desc = ", ".join(f"{span.label} {span.text}" for span in spans) + (" (logarithmic scale)" if log else "")
    return _chart(title, desc, [_Block("", spans)], marks)


def _fraction(value: float | None, whole: float) -> float:
    return 0.0 if value is None or whole <= 0 else min(1.0, max(0.0, value / whole))


def steps_below(whole: float) -> list[float]:
    """0 and the multiples of 1, 2 or 5 times a power of ten below ``whole``: three to six in all."""
    if whole <= 0:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(whole))
    step = next(power * factor for factor in (0.2, 0.5, 1.0, 2.0) if whole / (power * factor) <= 5)
    return [round(step * index, 12) for index in range(math.floor(whole / step + 1e-9) + 1)]


def _chart(title: str, desc: str, blocks: Sequence[_Block], marks: Sequence[Mark]) -> Markup:
    spans = [span for block in blocks for span in block.spans]
    marks = [Mark(mark.at, elided(mark.label, VALUES_AT_MOST)) for mark in marks]
    # Half of a label at either end of the axis stands outside of the plot.
    overhang = math.ceil(max((text_width(mark.label) for mark in marks), default=0.0) / 2)
    left = max(
        overhang,
        label_column([block.label for block in blocks] + [span.label for span in spans], LABELS_AT_MOST),
    )
    right = max(overhang, label_column([span.text for span in spans], VALUES_AT_MOST))
    parts: list[Markup] = []
    y = 0.0
    for block in blocks:
        y += _SPACE if parts else 0
        drawn, y = _block(block, y, left, right)
        parts += drawn
    shown = thinned(marks, WIDE - left - right)
    always = thinned(shown, MIN_WIDTH - left - right)
    grid = [
        element("line", {"class": "grid", "x1": placed(mark.at), "x2": placed(mark.at), "y1": 0, "y2": y})
        for mark in marks
    ]
    axis = [
        text_at(mark.label, y + 16, mark.at, "middle", css="" if mark in always else "wide") for mark in shown
    ]
    height = y + (_AXIS if marks else 0)
    return framed(title, desc, height, (left, right), [*grid, *parts, *axis])


def framed(title: str, desc: str, height: float, sides: tuple[int, int], parts: Iterable[Markup]) -> Markup:
    """A chart of its parts, ``height`` px high, with px for labels at its left and right; ``title`` and
    ``desc`` say it in words.
    """
    left, right = sides
    key = f"f{crc32((title + desc).encode('utf-8', 'backslashreplace')):08x}"
    frame = {
        "xmlns": "http://www.w3.org/2000/svg",
        "role": "img",
        "aria-labelledby": f"{key}t {key}d",
        "width": "100%",
        "height": height,
        "style": f"padding:0 {right}px 0 {left}px",
    }
    return element(
        "svg",
        frame,
        element("title", {"id": f"{key}t"}, title),
        element("desc", {"id": f"{key}d"}, desc),
        *parts,
    )


def element(name: str, attributes: Mapping[str, object], *children: object) -> Markup:
    """One element with everything in it escaped: attributes, and children that are not markup already.

    Example:
        >>> print(element("text", {"x": 0.5, "class": 'a"b'}, "1 < 2"))
        <text x="0.5" class="a&#34;b">1 &lt; 2</text>
    """
    written = "".join(
        f' {key}="{f"{value:g}" if isinstance(value, float) else escaped(value)}"'
        for key, value in attributes.items()
    )
    inner = "".join(map(escaped, children))
    return Markup(f"<{name}{written}>{inner}</{name}>" if children else f"<{name}{written}/>")


def _block(block: _Block, y: float, left: int, right: int) -> tuple[list[Markup], float]:
    """The elements of one block that starts at ``y``, and where it ends."""
    parts: list[Markup] = []
    plot = MIN_WIDTH - left - right
    if block.label:
        parts.append(text_at(elided(block.label, left), y + 16, None, "start", shift=-left, css="head"))
    if block.label or block.reference:
        y += _ROW
    top = y
    values: list[Markup] = []
    for span in block.spans:
        middle = y + _ROW / 2
        parts.append(text_at(elided(span.label, left - _GAP), middle + 4.5, None, "end", shift=-_GAP))
        if span.stop > span.start:
            parts.append(
                element(
                    "rect",
                    {
                        "class": span.tone,
                        "x": placed(span.start),
                        "y": middle - _BAR / 2,
                        "width": placed(span.stop - span.start),
                        "height": _BAR,
                        "rx": 2,
                    },
                )
            )
        value = elided(span.text or MISSING, right - _GAP)
        end = span.stop
        if (
            block.reference
            and span.stop <= block.reference.at <= span.stop + (text_width(value) + _GAP) / plot
        ):
            end = block.reference.at
        values.append(text_at(value, middle + 4.5, end, "start", shift=_GAP, css="value"))
        y += _ROW
    if block.reference:
        at, label = block.reference
        parts.append(
            element(
                "line", {"class": "reference", "x1": placed(at), "x2": placed(at), "y1": top - 4, "y2": y}
            )
        )
        # Next to the line, on the side where there is more room.
        room = (1 - at) * plot + right if at <= 0.5 else at * plot
        parts.append(text_at(elided(label, room), top - 8, at, "start" if at <= 0.5 else "end"))
    # Values come last: they have a halo, and stay readable where a line crosses them.
    return parts + values, y


def text_at(text: str, y: float, at: float | None, anchor: str, *, shift: int = 0, css: str = "") -> Markup:
    """One line of text ``y`` px from the top, at a fraction of the plot and moved by ``shift`` px."""
    extra = {**({"dx": shift} if shift else {}), **({"class": css} if css else {})}
    return element("text", {"x": placed(at or 0.0), "y": y, "text-anchor": anchor, **extra}, text)


def label_column(texts: Iterable[str], at_most: int) -> int:
    """The px that a column of labels takes."""
    return min(at_most, math.ceil(max(map(text_width, texts), default=0.0)) + _GAP)


def thinned(marks: Sequence[Mark], room: float) -> list[Mark]:
    """The marks whose labels fit next to each other in ``room`` px: all, or every second, third, ... of
    them.
    """
    widest = max((text_width(mark.label) for mark in marks), default=0.0) + _GAP
    for step in range(1, len(marks) + 1):
        kept = marks[::step]
        if all((b.at - a.at) * room >= widest for a, b in pairwise(kept)):
            return list(kept)
    return []


def placed(fraction: float) -> str:
    """A fraction of the plot as a length."""
    return f"{100 * fraction:.6g}%"
