"""What a pack says of how its training went: the losses and the evaluations, in a few points each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...readable import stretches
from .steps import evaluation_scores

_POINTS = 64


def losses_of(losses: Sequence[float]) -> list[dict[str, float]]:
    """The losses of all steps as at most 64 points: the last of neighbouring steps, and the mean of their
    losses in six digits.

    Example:
        >>> losses_of([2.0, 1.0])
        [{'step': 1, 'loss': 2.0}, {'step': 2, 'loss': 1.0}]
    """
    return [
        {"step": end, "loss": _six(math.fsum(losses[start:end]) / (end - start))}
        for start, end in stretches(len(losses), _POINTS)
    ]


def evaluations_of(log: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The evaluations in a trainer's log, at most 64 of them: the step after which each was made, and its
    metrics in six digits.

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
    return float(f"{value:.6g}")
