"""Text classification: the label of each row of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError
from .one_pass import NoOptions, OnePass, Prepared, text_inputs
from .rows import Row, types_of
from .scores import labelled
from .session import Arrays, Head, Session
from .task import HEADS, TASKS, Task, Training


def prepare(session: Session, row: Row, options: NoOptions) -> Prepared:
    """A text, a pair of texts, or token ids."""
    return Prepared(text_inputs(session, row))


def result(session: Session, row: Prepared, outputs: Arrays, head: Head, options: NoOptions) -> dict[str, Any]:
    """``label`` and ``scores``."""
    return labelled(outputs, head)


def encode(rows: Any, tokenizer: Any, max_length: int, where: object, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Token ids and types and the label's index; columns ``text`` (or ``sentence1`` and ``sentence2``) and ``label``.

    Raises:
        ConfigError: other columns, or a label that is not among ``labels``.
    """
    pairs = {"sentence1", "sentence2"} <= set(rows.column_names)
    if "label" not in rows.column_names or not (pairs or "text" in rows.column_names):
        raise ConfigError("classification needs the columns text and label", where=where, found=", ".join(rows.column_names))
    index = {label: position for position, label in enumerate(labels)}
    encoded = []
    for number, row in enumerate(rows):
        place = f"{where}, row {number + 1}"
        if str(row["label"]) not in index:
            raise ConfigError("a label that the training data does not have", where=place, expected=", ".join(labels), found=row["label"])
        texts = (row["sentence1"], row["sentence2"]) if pairs else (row["text"],)
        if not all(isinstance(text, str) for text in texts):
            raise ConfigError("a row without text", where=place, found=", ".join(map(repr, texts)))
        tokens = tokenizer(*texts, truncation=True, max_length=max_length)
        encoded.append({"input_ids": tokens["input_ids"], "labels": index[str(row["label"])], **types_of(tokens)})
    return encoded


def accuracy(outputs: Any, labels: np.ndarray) -> float:
    """The share of rows whose largest logit is that of their label."""
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return float((np.argmax(logits, -1) == labels).mean())


TASKS.register(Task(
    "text-classification", "AutoModelForSequenceClassification", OnePass(prepare, result), ("ForSequenceClassification",),
    heads=HEADS, labelled=True, training=Training(encode, accuracy=accuracy), peft_type="SEQ_CLS",
))
