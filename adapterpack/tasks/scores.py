"""Logits of one row as probabilities, labels and scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .session import Session


def probabilities(logits: np.ndarray) -> np.ndarray:
    """The softmax of a vector."""
    weights = np.exp(logits - logits.max())
    normalized: np.ndarray = weights / weights.sum()
    return normalized


def scored(logits: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """The likeliest label, and the probability of each."""
    chances = probabilities(logits[: len(labels)])
    return {"label": labels[int(chances.argmax())],
            "scores": {label: round(float(score), 6) for label, score in zip(labels, chances, strict=True)}}


def no_head(what: str) -> dict[str, Any]:
    """The answer of a head that nobody trained."""
    return {what: None, "note": "the base has no trained head for this task"}


def label_answers(session: Session, inputs: dict[str, np.ndarray], adapters: Sequence[str | None]) -> list[dict[str, Any]]:
    """The label of each row, by the labels of its own adapter."""
    logits = session.run(inputs, adapters)["logits"]
    return [no_head("label") if (labels := session.trained_labels(adapter)) is None else scored(row, labels)
            for row, adapter in zip(logits, adapters, strict=True)]


def embedding(vector: np.ndarray) -> dict[str, Any]:
    """A vector as the answer of a row."""
    return {"embedding": [float(value) for value in vector]}
