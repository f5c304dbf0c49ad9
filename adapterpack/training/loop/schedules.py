"""Schedules of the learning rate that transformers lacks: cosines with a curved warm-up or an early end."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

OWN = frozenset({"warmup_power", "decay_share"})
"""Settings of a cosine, under ``lr_scheduler_kwargs``, that transformers does not know."""


def own_schedule(arguments: Any, steps: int) -> Callable[[int], float] | None:
    """Returns the share of the learning rate at each step, if a cosine has settings of ours; None if
    transformers has the schedule.
    """
    given = arguments.lr_scheduler_kwargs or {}
    if not arguments.lr_scheduler_type.startswith("cosine") or OWN.isdisjoint(given):
        return None
    return partial(cosine_share, warmup=arguments.get_warmup_steps(steps), steps=steps, **given)


def cosine_share(
    step: int,
    warmup: int,
    steps: int,
    warmup_power: float = 1.0,
    decay_share: float = 1.0,
    min_lr_rate: float = 0.0,
) -> float:
    """Returns ``(step / warmup)^power`` in the warm-up, then half a cosine from 1 to ``min_lr_rate``, which
    is reached after ``decay_share`` of all ``steps``, as in axolotl's schedules.

    Example:
        >>> [cosine_share(step, 2, 10, 2.0, 0.6, 0.1) for step in (0, 1, 2, 4, 6, 9)]
        [0.0, 0.25, 1.0, 0.55, 0.1, 0.1]
    """
    if step < warmup:
        return float((step / max(1, warmup)) ** warmup_power)
    end = int(steps * decay_share)
    done = (min(step, end) - warmup) / max(1, end - warmup)
    return min_lr_rate + (1 - min_lr_rate) * 0.5 * (1 + math.cos(math.pi * done))
