"""Masked language modelling: the most likely words in the place of a mask."""

from __future__ import annotations

import numpy as np

from ..errors import ConfigError, excerpt
from .data import Result, Row, probabilities
from .one_pass import NoOptions, OnePass, PreparedRow, text_inputs
from .session import Arrays, RowHead, RowInputs
from .task import TASKS, Task

BEST = 5
"""How many words an answer contains."""


def prepare(session: RowInputs, row: Row, options: NoOptions) -> PreparedRow:
    """Prepares a text with a mask, and notes the mask's position."""
    inputs = text_inputs(session, row)
    tokenizer = session.tokenizer
    places = np.flatnonzero(inputs["input_ids"][0] == tokenizer.mask_id)
    if tokenizer.mask_id is None or not len(places):
        raise ConfigError(
            "a row of this task needs a mask",
            found=excerpt(row.get("text", row.get("prompt"))),
            expected=tokenizer.mask_token or "a tokenizer with a mask token",
        )
    return PreparedRow(inputs, int(places[0]))


def result(
    session: RowInputs, row: PreparedRow, outputs: Arrays, head: RowHead, options: NoOptions
) -> Result:
    """Returns ``words``: text and probability of each, for the first mask."""
    chances = probabilities(outputs["logits"][0, row.notes])
    best = np.argsort(-chances, kind="stable")[:BEST]
    return {
        "words": [
            {"text": session.tokenizer.decode([int(i)]), "score": round(float(chances[i]), 6)} for i in best
        ]
    }


TASKS.register(Task("fill-mask", "AutoModelForMaskedLM", OnePass(prepare, result), ("ForMaskedLM",)))
