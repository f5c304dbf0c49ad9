"""Feature extraction: an embedding of each row of text."""

from __future__ import annotations

from typing import Any

from .data.rows import Row
from .embeddings import EmbeddingOptions, pooled, width_of
from .one_pass import OnePass, Prepared, text_inputs
from .session import Arrays, Head, RowInputs
from .task import TASKS, Task


def prepare(session: RowInputs, row: Row, options: EmbeddingOptions) -> Prepared:
    """A text, a pair of texts, or token ids."""
    options.require_fit(width_of(session))
    return Prepared(text_inputs(session, row))


def result(
    session: RowInputs, row: Prepared, outputs: Arrays, head: Head, options: EmbeddingOptions
) -> dict[str, Any]:
    """``embedding``: the hidden states of the row, pooled as the bundle says."""
    return pooled(session, next(iter(outputs.values())), row.inputs["attention_mask"], options)


TASKS.register(
    Task(
        "feature-extraction",
        "AutoModel",
        OnePass(prepare, result, EmbeddingOptions),
        ("Model",),
        peft_type="FEATURE_EXTRACTION",
    )
)
