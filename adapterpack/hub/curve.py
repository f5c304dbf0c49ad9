"""Draws how a loss fell as text, which every reader of Markdown shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_ROWS = 8
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def curve(points: Sequence[Mapping[str, float]]) -> str:
    """Columns of blocks over the steps, from the least loss or 0 to the largest.

    Example:
        >>> print(curve([{"step": 10, "loss": 2.0}, {"step": 20, "loss": 0.5}]).splitlines()[-2])
        0        ██
    """
    losses = [point["loss"] for point in points]
    low, high = min([0.0, *losses]), max([0.0, *losses])
    heights = [round(8 * _ROWS * (loss - low) / ((high - low) or 1.0)) for loss in losses]
    labels = {0: f"{high:.3g}", _ROWS - 1: f"{low:.3g}"}
    rows = [
        f"{labels.get(row, ''):8} "
        + "".join(_EIGHTHS[min(max(height - 8 * (_ROWS - 1 - row), 0), 8)] for height in heights)
        for row in range(_ROWS)
    ]
    ends = ", ".join(f"step {point['step']:.0f}: {point['loss']:.3g}" for point in (points[0], points[-1]))
    return "\n".join([*(row.rstrip() for row in rows), f"{'':8} {ends}"])
