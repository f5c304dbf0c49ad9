"""Chooses the next token of each row from its logits: the likeliest, or drawn after top-k and top-p."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; ``temperature`` 0 is greedy. ``stop`` texts end a row and are cut off."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # else each of its characters would be a stop text
            object.__setattr__(self, "stop", (self.stop,))
        if not all(isinstance(text, str) for text in self.stop):
            raise ConfigError("a stop text is a text", where="stop", found=repr(self.stop)[:80])
        if self.max_new_tokens < 1 or not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError("sampling parameters out of range", found=self,
                              expected="max_new_tokens >= 1, temperature >= 0, top_k >= 0, 0 < top_p <= 1")


def choose(logits: np.ndarray, options: Sampling, draws: Sequence[np.random.Generator]) -> np.ndarray:
    """The next token of each row from its logits ``[rows, vocabulary]``: the largest, or drawn after top-k and top-p."""
    if options.temperature == 0:
        greedy: np.ndarray = np.argmax(logits, axis=-1).astype(np.int64)
        return greedy
    chosen = []
    for row, rng in zip(logits.astype(np.float64) / options.temperature, draws, strict=True):
        order = np.argsort(-row, kind="stable")
        order = order[: options.top_k] if options.top_k else order
        weights = np.exp(row[order] - row[order[0]])
        weights /= weights.sum()
        kept = int(np.searchsorted(np.cumsum(weights), options.top_p)) + 1
        order, weights = order[:kept], weights[:kept] / weights[:kept].sum()
        chosen.append(int(rng.choice(order, p=weights)))
    return np.array(chosen, np.int64)
