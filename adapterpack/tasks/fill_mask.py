"""Masked language modelling: the likeliest words in the place of a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .rows import Row, RowError, map_rows, text_of
from .scores import probabilities
from .session import Session
from .task import TASKS, Task

BEST = 5
"""How many words are given."""


def answer(session: Session, rows: Sequence[Row], adapters: Sequence[str | None], sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``words``: text and probability of each, in the place of the first mask."""
    texts, tokenizer = map_rows(rows, text_of), session.tokenizer
    inputs = session.encode(texts)
    logits = session.run(inputs, adapters)["logits"]
    results = []
    for number, (text, ids, scores) in enumerate(zip(texts, inputs["input_ids"], logits, strict=True), 1):
        places = np.flatnonzero(ids == tokenizer.mask_id)
        if tokenizer.mask_id is None or not len(places):
            raise RowError("a row of this task needs a mask", row=number, found=text[:80],
                           expected=tokenizer.mask_token or "a tokenizer with a mask token")
        chances = probabilities(scores[places[0]])
        best = np.argsort(-chances, kind="stable")[:BEST]
        results.append({"words": [{"text": tokenizer.decode([int(i)]), "score": round(float(chances[i]), 6)} for i in best]})
    return results


TASKS.register(Task("fill-mask", "AutoModelForMaskedLM", answer, ("ForMaskedLM",)))
