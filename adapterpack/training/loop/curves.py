"""Summarises losses and evaluations of a training in a few points, for the pack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...readable import stretches
from .steps import evaluation_scores

_POINTS = 64


def losses_of(losses: Sequence[float]) -> list[dict[str, float]]:
    """Returns the losses of all steps as at most 64 points: the mean loss of neighbouring steps, rounded to
    six digits, at the last of them.

    Example:
        >>> losses_of([2.0, 1.0])
        [{'step': 1, 'loss': 2.0}, {'step': 2, 'loss': 1.0}]
    """
    return [
        {"step": end, "loss": _six(math.fsum(losses[start:end]) / (end - start))}
        for start, end in stretches(len(losses), _POINTS)
    ]


def evaluations_of(log: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Returns at most 64 evaluations from a trainer's log: the step, and the metrics rounded to six digits.

    Example:
        >>> evaluations_of([{"loss": 1.0, "step": 1}, {"eval_loss": 0.5, "eval_runtime": 0.1, "step": 2}])
        [{'step': 2, 'loss': 0.5}]
    """
    found = {int(entry["step"]): scores for entry in reversed(log) if (scores := evaluation_scores(entry))}
    every = [
        {"step": step, **{name: _six(value) for name, value in found[step].items() if math.isfinite(value)}}
        for step in sorted(found)
    ]
    return [every[end - 1] for _, end in stretches(len(every), _POINTS)]


def _six(value: float) -> float:
    """Rounds to six significant digits."""
    return float(f"{value:.6g}")
