"""Converts the logits of one row to probabilities, labels and scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .rows import Result


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the softmax of a vector."""
    weights = np.exp(logits - logits.max())
    normalized: np.ndarray = weights / weights.sum()
    return normalized


def score_labels(logits: np.ndarray, labels: Sequence[str]) -> Result:
    """Returns the most likely label, and the probability of each. A head with a single label (a ranker) gets
    the logistic of its logit, as in transformers' pipelines, because the softmax of one logit is always 1.

    Example:
        >>> score_labels(np.array([0.0, -1e9]), ["relevant"])
        {'label': 'relevant', 'scores': {'relevant': 0.5}}
    """
    own = logits[: len(labels)]
    chances = probabilities(own) if len(labels) > 1 else probabilities(np.array([own[0], 0.0], own.dtype))[:1]
    return {
        "label": labels[int(chances.argmax())],
        "scores": {label: round(float(score), 6) for label, score in zip(labels, chances, strict=True)},
    }


def any_of(logits: np.ndarray, labels: Sequence[str], likely: float) -> Result:
    """Returns the independent probability of each label, the most likely one, and all labels that are at
    least as probable as ``likely``.

    Example:
        >>> any_of(np.array([0.0, 9.0, -9.0]), ["new", "urgent", "spam"], 0.5)["labels"]
        ['new', 'urgent']
    """
    chances = [
        score_labels(np.array([logit]), [label])["scores"][label]
        for logit, label in zip(logits, labels, strict=False)
    ]
    scores = dict(zip(labels, chances, strict=True))
    return {
        "label": labels[int(np.argmax(chances))],
        "labels": [label for label in labels if scores[label] >= likely],
        "scores": scores,
    }


def score_value(logits: np.ndarray, labels: Sequence[str]) -> Result:
    """Returns the number that a regression head outputs.

    Example:
        >>> score_value(np.array([3.25]), ["score"])
        {'label': 'score', 'scores': {'score': 3.25}}
    """
    return {
        "label": labels[0],
        "scores": {label: round(float(value), 6) for label, value in zip(labels, logits, strict=False)},
    }


def no_head(what: str) -> Result:
    """Returns the answer for a head that was never trained."""
    return {what: None, "note": "the base has no trained head for this task"}
