"""Logits of one row as probabilities, labels and scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .session import Arrays, Head


def probabilities(logits: np.ndarray) -> np.ndarray:
    """The softmax of a vector."""
    weights = np.exp(logits - logits.max())
    normalized: np.ndarray = weights / weights.sum()
    return normalized


def scored(logits: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """The likeliest label, and the probability of each. The one label of a head that ranks has the logistic of its logit, as
    transformers' pipelines give it: of one label alone the softmax is always 1.

    Example:
        >>> scored(np.array([0.0, -1e9]), ["relevant"])
        {'label': 'relevant', 'scores': {'relevant': 0.5}}
    """
    own = logits[: len(labels)]
    chances = probabilities(own) if len(labels) > 1 else probabilities(np.array([own[0], 0.0], own.dtype))[:1]
    return {"label": labels[int(chances.argmax())],
            "scores": {label: round(float(score), 6) for label, score in zip(labels, chances, strict=True)}}


def no_head(what: str) -> dict[str, Any]:
    """The answer of a head that nobody trained."""
    return {what: None, "note": "the base has no trained head for this task"}


def labelled(outputs: Arrays, head: Head) -> dict[str, Any]:
    """The label of a row of logits ``[1, labels]``, by its own head's labels: logits beyond these are other adapters'."""
    return no_head("label") if head.labels is None else scored(outputs["logits"][0], head.labels)
