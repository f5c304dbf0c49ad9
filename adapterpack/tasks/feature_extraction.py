"""Feature extraction: an embedding of each row of text."""

from __future__ import annotations

from .data import Result, Row
from .embeddings import EmbeddingOptions, pool, width_of
from .one_pass import OnePass, PreparedRow, text_inputs
from .session import Arrays, RowHead, RowInputs
from .task import TASKS, Task


def prepare(session: RowInputs, row: Row, options: EmbeddingOptions) -> PreparedRow:
    """Prepares a text, a pair of texts, or token ids."""
    options.require_fit(width_of(session))
    return PreparedRow(text_inputs(session, row))


def result(
    session: RowInputs, row: PreparedRow, outputs: Arrays, head: RowHead, options: EmbeddingOptions
) -> Result:
    """Returns ``embedding``: the hidden states of the row, pooled by the bundle's method."""
    return pool(session, next(iter(outputs.values())), row.inputs["attention_mask"], options)


TASKS.register(
    Task(
        "feature-extraction",
        "AutoModel",
        OnePass(prepare, result, EmbeddingOptions),
        ("Model",),
        peft_type="FEATURE_EXTRACTION",
    )
)
