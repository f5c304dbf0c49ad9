"""Feature extraction: an embedding of each row of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .rows import Row, map_rows, text_of
from .scores import embedding
from .session import Arrays, Session
from .task import TASKS, Task


def answer(session: Session, rows: Sequence[Row], adapters: Sequence[str | None], sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``embedding``: the hidden states of a row, pooled as the bundle says."""
    return embedded(session, session.encode(map_rows(rows, text_of)), adapters)


def embedded(session: Session, inputs: Arrays, adapters: Sequence[str | None]) -> list[dict[str, Any]]:
    """The pooled first output of each row."""
    hidden = next(iter(session.run(inputs, adapters).values()))
    mask = inputs.get("attention_mask", np.ones(hidden.shape[:2], np.int64))
    return [embedding(row) for row in POOLING[session.bundle.pooling](hidden, mask)]


def _mean(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    pooled: np.ndarray = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return pooled


def _last(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    pooled: np.ndarray = hidden[np.arange(len(hidden)), mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)]
    return pooled


def _first(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    pooled: np.ndarray = hidden[np.arange(len(hidden)), np.argmax(mask, axis=1)]
    return pooled


POOLING: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"mean": _mean, "cls": _first, "last": _last}
"""How hidden states ``[rows, positions, n]`` become one vector a row: over real positions ``[rows, positions]``."""


TASKS.register(Task("feature-extraction", "AutoModel", answer, ("Model",), peft_type="FEATURE_EXTRACTION"))
