"""Text classification: the label of each row of text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from .data import LABEL_COLUMNS, OWN_COLUMNS, Encoded, Labels, Result, Row, report_of, text_of, types_of
from .one_pass import NoOptions, OnePass, PreparedRow, text_inputs
from .session import Arrays, RowHead, RowInputs
from .task import HEADS, MAIN, TASKS, TEXT, Part, Task, TaskTraining

log = logging.getLogger(__name__)

COLUMNS = (
    ("sentence1", "sentence2"),
    ("text", "text_pair"),
    ("text1", "text2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
    ("content",),
    ("review",),
)
"""The columns of a text or of two texts in data sets; the first entry whose columns are all present is
used.
"""


def prepare(session: RowInputs, row: Row, options: NoOptions) -> PreparedRow:
    """Prepares a text, a pair of texts, token ids, or a prompt with its ``completion``, as reward models are
    trained on it: with the end token.
    """
    if isinstance(answer := row.get("completion"), str):
        end = session.tokenizer.special_tokens.get("eos_token", "")
        return PreparedRow(session.encode([(text_of(row) + answer).removesuffix(end) + end]))
    return PreparedRow(text_inputs(session, row))


def result(
    session: RowInputs, row: PreparedRow, outputs: Arrays, head: RowHead, options: NoOptions
) -> Result:
    """Returns ``label`` and ``scores``."""
    return head.score(outputs["logits"][0])


def encode(rows: Any, tokenizer: Any, max_length: int, where: object, labels: Labels) -> list[Encoded]:
    """Returns token ids, token types and the training target of the label. The columns are ``label`` or
    ``labels`` and those of :data:`COLUMNS`.

    The log says which columns are not read and how many rows are cut.

    Raises:
        ConfigError: other columns, or a label that is not among ``labels``.
    """
    columns, label = columns_of(rows, where)
    report = report_of(where)

    def encode_row(row: Row, place: object) -> Encoded:
        target = labels.target(row[label], place)
        texts = texts_of(row, columns, place)
        tokens = report.tokenize(tokenizer, max_length, *texts)
        return {"input_ids": tokens["input_ids"], "labels": target, **types_of(tokens)}

    encoded = report.encode(rows, encode_row)
    log.info("%s: %d rows of %s, %d labels", where, len(rows), " + ".join(columns), len(labels.names))
    report.warn_of_cuts(rows, max_length)
    return encoded


def columns_of(rows: Any, where: object) -> tuple[tuple[str, ...], str]:
    """Returns the columns of the texts and of the label of a table, and records them as its format.

    Raises:
        ConfigError: they are missing.
    """
    label = next((name for name in LABEL_COLUMNS if name in rows.column_names), None)
    columns = next((columns for columns in COLUMNS if {*columns} <= set(rows.column_names)), None)
    if columns is None or label is None:
        raise ConfigError(
            "classification needs the columns text and label",
            where=where,
            found=", ".join(rows.column_names),
            expected="label and " + ", or ".join(map(" + ".join, COLUMNS)),
            remedy=OWN_COLUMNS,
        )
    report_of(where).read_as(" + ".join(columns), rows.column_names, {*columns, label})
    return columns, label


def texts_of(row: Row, columns: Sequence[str], place: object) -> list[str]:
    """Returns the texts in these columns of a row.

    Raises:
        ConfigError: one of them is no text.
    """
    texts = [row[column] for column in columns]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError("a row without text", where=place, found=", ".join(map(repr, texts)))
    return texts


TASKS.register(
    Task(
        "text-classification",
        "AutoModelForSequenceClassification",
        OnePass(prepare, result),
        ("ForSequenceClassification",),
        columns={"input_ids": list},
        parts=(Part(MAIN, "plain", (*TEXT, "token_type_ids"), optional=("token_type_ids",)),),
        heads=HEADS,
        labelled=True,
        training=TaskTraining(encode),
        peft_type="SEQ_CLS",
    )
)
