"""Suggests the settings of a training from its base, method and data, each with the reason for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..base import Checkpoint
from ..readable import things
from ..runtime import context_length

_RATE = 5e-4
_WIDTH = 2000
_FALL = 0.78
_HIGHEST = 1e-3
"""The learning rate of a LoRA of a model of that width, and how fast it falls with the width (Schulman et al.
2025, "LoRA Without Regret", https://thinkingmachines.ai/blog/lora/, fitted on language models). Of models
narrower than theirs the last is the highest that is safe: MiniLM learns best with it, and not at all with
four times as much.
"""
_ALPHA = 32
"""The alpha with which that rate was measured, for all ranks alike."""
_TIMES: Mapping[str, float] = {"lora": 1, "dora": 1, "bottleneck": 5, "ia3": 20, "prefix_tuning": 20}
"""Method -> its learning rate over LoRA's, as ``benchmarks/tasks.py`` measured them on MiniLM.
"""
_LEAST_RANK, _MOST_RANK = 8, 256
_TOKENS = 2
"""The tokens that a number can hold: about two bits a number (Allen-Zhu and Li 2024,
https://arxiv.org/abs/2404.05405), and a token of a text that is worth learning has about one.
"""
_STEPS, _MOST_EPOCHS = 200, 10
"""The steps that a small data set should have, and the most passes over it."""


class DataFacts(NamedTuple):
    """What a data set shows: how many ``rows`` it has, ``tokens`` or labels to learn, and the tokens of its
    ``longest`` row; 0 where rows have none.
    """

    rows: int
    tokens: int
    longest: int


class Suggestion(NamedTuple):
    """A value for a setting, and why."""

    value: Any
    reason: str


def suggest(
    folder: Path, config: Mapping[str, Any], data: DataFacts, method: str = "lora", batch: int = 8
) -> dict[str, Suggestion]:
    """Returns settings that fit a base (``config`` is that of its language part), a method, the data and the
    rows of a step.

    What nothing was measured for is left out.

    Example:
        >>> found = suggest(Path("models/base"), {"hidden_size": 2000}, DataFacts(80, 80, 40), "ia3")
        >>> found["learning_rate"].value, found["max_length"].value
        (0.01, 64)
    """
    found = {}
    width = config.get("hidden_size") or config.get("d_model")
    if (times := _TIMES.get(method)) is not None and isinstance(width, int):
        rate = float(f"{times * min(_RATE * (_WIDTH / width) ** _FALL, _HIGHEST):.2g}")
        found["learning_rate"] = Suggestion(rate, f"for {method} on a model of width {width}")
    if method in {"lora", "dora"}:
        numbers = _numbers_per_rank(folder)
        rank = _LEAST_RANK
        while rank < _MOST_RANK and rank * numbers * _TOKENS < data.tokens:
            rank *= 2
        found["r"] = Suggestion(
            rank, f"room for {data.tokens:,} learned tokens or labels" if data.tokens else "to start with"
        )
        found["alpha"] = Suggestion(_ALPHA, "the learning rate is for this one, whatever the rank")
        found["targets"] = Suggestion("all-linear", "attention alone learns less")
    steps = max(1, data.rows // batch)
    epochs = min(_MOST_EPOCHS, math.ceil(_STEPS / steps)) if steps * 3 < _STEPS else 1 if steps > 5000 else 3
    found["num_train_epochs"] = Suggestion(epochs, f"{things(steps, 'step')} of {batch} rows each")
    if data.longest:
        most = context_length(dict(config), folder)
        length = max(16, 2 ** math.ceil(math.log2(data.longest)))
        found["max_length"] = Suggestion(
            length if most is None else min(length, most), f"the longest row has {data.longest} tokens"
        )
    return found


def _numbers_per_rank(folder: Path) -> int:
    """Returns how many numbers a LoRA of rank 1 has on all linear layers of a base; 1 if its files tell
    nothing.
    """
    checkpoint = Checkpoint(folder)
    return max(
        1,
        sum(
            sum(info.shape)
            for name, info in checkpoint.tensors.items()
            if len(info.shape) == 2 and checkpoint.linear_kind(name) is not None
        ),
    )
