"""Lines as SVG markup: spectra, which fall on a logarithmic scale, and losses over the steps of a
training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from ..io.readable import stretches
from .svg import MIN_WIDTH, Mark, element, framed, label_column, steps_below, text_at, thinned
from .text import elided

_ROW, _AXIS, _GAP, _LABELS = 22, 24, 8, 210
_PLOT = 170
_POINTS = 200
"""Points of a line at most: more cannot be seen apart."""


class Line(NamedTuple):
    """One line: its label, its values from index 1 on, a band around them (lower, upper), and a tone of the
    palette.
    """

    label: str
    values: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None
    tone: str


def spectrum_lines(title: str, lines: Sequence[Line], *, floor: float = 1e-4) -> Markup:
    """Falling curves on a logarithmic scale from 1 down to ``floor``, with a band around each.

    Example:
        >>> chart = spectrum_lines("Spectra", [Line("a", [1.0, 0.1], ([1.0, 0.05], [1.0, 0.2]), "c1")])
        >>> "polyline" in chart, "polygon" in chart
        (True, True)
    """
    decades = max(1, round(-math.log10(floor)))
    longest = max((len(line.values) for line in lines), default=0)
    desc = ". ".join(
        f"{line.label}: {', '.join(f'{value:.2g}' for value in line.values[:16])}" for line in lines
    )
    return _drawn(
        title,
        desc,
        lines,
        [Mark(step / decades, f"{10.0**-step:g}") for step in range(decades + 1)],
        lambda value: min(1.0, -math.log10(max(value, floor)) / decades),
        list(map(str, range(1, longest + 1))),
    )


def loss_lines(title: str, losses: Sequence[tuple[str, Sequence[int], Sequence[float]]]) -> Markup:
    """The losses of trainings: for each a label, the numbers of its steps, and as many losses; the axis
    begins at 0, or at the least.

    Of a long training a point is the mean of neighbouring steps, and the band around it goes from the least
    to the largest of them.

    Example:
        >>> chart = loss_lines("Loss", [("tickets", [1, 2, 3], [2.0, 1.0, 0.5])])
        >>> "polyline" in chart, "from 2 to 0.5" in chart
        (True, True)
    """
    tones, lines = ("c1", "c2", "c3"), []
    longest = max((steps for _, steps, _ in losses), key=len, default=())
    parts = stretches(len(longest), _POINTS)
    for index, (label, _, values) in enumerate(losses):
        pieces = [piece for start, end in parts if (piece := values[start:end])]
        band = (
            None
            if len(pieces) == len(values)
            else ([min(piece) for piece in pieces], [max(piece) for piece in pieces])
        )
        lines.append(
            Line(label, [math.fsum(piece) / len(piece) for piece in pieces], band, tones[index % len(tones)])
        )
    every = [value for _, _, values in losses for value in values]
    low, high = min([0.0, *every]), max([0.0, *every])
    top = high - low or 1.0
    ticks = steps_below(high or 1.0) if low == 0 else [low, *([high] if high else [0.0])]
    desc = ". ".join(
        f"{label}: from {values[0]:.3g} to {values[-1]:.3g}, {len(values)} steps"
        for label, _, values in losses
        if values
    )

    def y(value: float) -> float:
        return min(1.0, max(0.0, 1 - (value - low) / top))

    return _drawn(
        title,
        desc,
        lines,
        [Mark(y(value), f"{value:.3g}") for value in ticks],
        y,
        [str(longest[end - 1]) for _, end in parts],
    )


def _drawn(
    title: str,
    desc: str,
    lines: Sequence[Line],
    scale: Sequence[Mark],
    y: Callable[[float], float],
    labels: Sequence[str],
) -> Markup:
    """Lines over a grid: ``y`` places a value, from 0 at the top to 1; ``labels`` are those of the points."""
    longest = max((len(line.values) for line in lines), default=0)
    left, right = label_column([mark.label for mark in scale], _LABELS), 24

    def x(index: int) -> float:
        return index / (longest - 1) if longest > 1 else 0.5

    def points(values: Sequence[float], order: int = 1) -> str:
        return " ".join(
            f"{100 * x(index):.4g},{100 * y(value):.4g}" for index, value in list(enumerate(values))[::order]
        )

    curves = []
    for line in lines:
        if line.band is not None:
            low, high = line.band
            curves.append(
                element(
                    "polygon", {"class": f"band {line.tone}", "points": f"{points(high)} {points(low, -1)}"}
                )
            )
        curves.append(element("polyline", {"class": f"curve {line.tone}", "points": points(line.values)}))
    top = _ROW * len(lines) + _GAP
    grid: list[Markup] = []
    for mark in scale:
        height = top + _PLOT * mark.at
        grid.append(element("line", {"class": "grid", "x1": "0%", "x2": "100%", "y1": height, "y2": height}))
        grid.append(text_at(mark.label, height + 4.5, None, "end", shift=-_GAP))
    frame = {
        "x": 0,
        "y": top,
        "width": "100%",
        "height": _PLOT,
        "viewBox": "0 0 100 100",
        "preserveAspectRatio": "none",
    }
    plot = element("svg", frame, *curves)
    marks = [Mark(x(index), label) for index, label in enumerate(labels)]
    axis = [
        text_at(mark.label, top + _PLOT + 20, mark.at, "middle")
        for mark in thinned(marks, MIN_WIDTH - left - right)
    ]
    keys = []
    for index, line in enumerate(lines):
        keys.append(
            element(
                "rect",
                {"class": line.tone, "x": 0, "y": index * _ROW + 3, "width": 12, "height": 12, "rx": 2},
            )
        )
        keys.append(
            text_at(
                elided(line.label, MIN_WIDTH - left - right - 24), index * _ROW + 13, None, "start", shift=20
            )
        )
    return framed(title, desc, top + _PLOT + _AXIS + 4, (left, right), [*grid, plot, *axis, *keys])
