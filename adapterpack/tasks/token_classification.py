"""Token classification: the label of every token of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .rows import Row, map_rows, text_of
from .scores import no_head, scored
from .session import Session
from .task import HEADS, TASKS, Task


def answer(session: Session, rows: Sequence[Row], adapters: Sequence[str | None], sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``tokens``: of each the text, where its characters are, its label and that label's probability."""
    texts = map_rows(rows, text_of)
    logits = session.run(session.encode(texts), adapters)["logits"]
    results: list[dict[str, Any]] = []
    for text, scores, adapter in zip(texts, logits, adapters, strict=True):
        labels = session.trained_labels(adapter)
        if labels is None:
            results.append(no_head("label"))
            continue
        tokens = []
        for place, (start, stop) in enumerate(session.tokenizer.places(text)):
            if stop > start:  # special tokens stand for no character
                best = scored(scores[place], labels)
                tokens.append({"text": text[start:stop], "start": start, "end": stop, "label": best["label"],
                               "score": best["scores"][best["label"]]})
        results.append({"tokens": tokens})
    return results


TASKS.register(Task(
    "token-classification", "AutoModelForTokenClassification", answer, ("ForTokenClassification",), heads=HEADS, labelled=True,
    peft_type="TOKEN_CLS",
))
