"""Token classification: the label of every token of a text."""

from __future__ import annotations

from typing import Any

from .one_pass import NoOptions, OnePass, Prepared
from .rows import Row, text_of
from .scores import no_head, scored
from .session import Arrays, Head, Session
from .task import HEADS, TASKS, Task


def prepare(session: Session, row: Row, options: NoOptions) -> Prepared:
    """A text."""
    text = text_of(row)
    return Prepared(session.encode([text]), text)


def result(session: Session, row: Prepared, outputs: Arrays, head: Head, options: NoOptions) -> dict[str, Any]:
    """``tokens``: of each the text, where its characters are, its label and that label's probability."""
    if head.labels is None:
        return no_head("label")
    text, tokens = row.notes, []
    for place, (start, stop) in enumerate(session.tokenizer.places(text)):
        if stop > start:  # special tokens stand for no character
            best = scored(outputs["logits"][0, place], head.labels)
            tokens.append({"text": text[start:stop], "start": start, "end": stop, "label": best["label"],
                           "score": best["scores"][best["label"]]})
    return {"tokens": tokens}


TASKS.register(Task(
    "token-classification", "AutoModelForTokenClassification", OnePass(prepare, result), ("ForTokenClassification",), heads=HEADS,
    labelled=True, peft_type="TOKEN_CLS",
))
