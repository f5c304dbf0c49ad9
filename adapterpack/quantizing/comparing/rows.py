"""Reads the rows on which quantized forms are compared: each with its question, its expected answer and the
tokens to score.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ...errors import ConfigError, Unsupported
from ...runtime import Session
from ...tasks.data import LABEL_COLUMNS, Row
from ..graphs import MOST_TOKENS, encode_row, read_rows


class Example(NamedTuple):
    """One row. ``asked`` is the runner's input, ``expected`` the right answer, if the row has one. ``ids``
    are the tokens of the full row, of which the answer follows the first ``given``; empty for a classifier.
    """

    asked: Row
    expected: str | None
    ids: tuple[int, ...] = ()
    given: int = 0


def examples(session: Session, file: Path) -> list[Example]:
    """Reads the rows of a file for the bundle's task: ``text``, ``messages``, or ``prompt`` and
    ``completion`` for a model that generates text; text and ``label`` for a classifier.

    If the last message is the assistant's, it is the answer. At most
    :data:`~adapterpack.quantizing.graphs.calibration_rows.MOST_ROWS` rows are read.

    Raises:
        StorageError: the file cannot be read.
        ConfigError: a row cannot be read, or lacks what the task needs; or there is no row.
        Unsupported: the task neither generates text from text nor gives one label a row.
    """
    task = session.task
    if len(task.parts) == 1 and task.generates and "input_ids" in task.main.inputs:
        found = [_generation_row(session, _with_completion(row), where) for row, where in read_rows(file)]
        if not any(len(example.ids) > max(example.given, 1) for example in found):
            raise ConfigError(
                "no row has tokens to score",
                where=file.name,
                expected=f"an answer within the first {MOST_TOKENS} tokens",
                remedy="give rows with text, or with prompt and completion",
            )
        return found
    if task.labelled and task.training is not None and task.training.parts is None:
        return [_label_row(row, where) for row, where in read_rows(file)]
    raise Unsupported(
        "rows are compared by the text that a model generates, or by the label that it gives a text",
        where=session.folder.name,
        found=task.name,
        remedy="compare the errors that quantize reports instead",
    )


def _with_completion(row: Row) -> Row:
    messages = row.get("messages")
    if not isinstance(messages, list) or len(messages) < 2 or "completion" in row:
        return row
    *before, last = messages
    if (
        not isinstance(last, Mapping)
        or last.get("role") != "assistant"
        or not isinstance(last.get("content"), str)
    ):
        return row
    return {"messages": before, "completion": last["content"]}


def _generation_row(session: Session, row: Row, where: str) -> Example:
    ids, given = encode_row(session, row, where)
    expected = row.get("completion")
    asked = {key: row[key] for key in ("prompt", "messages") if key in row}
    if not asked or not isinstance(expected, str):
        return Example({}, None, tuple(ids[:MOST_TOKENS]), 0)
    return Example(asked, expected, tuple(ids[:MOST_TOKENS]), min(given, MOST_TOKENS))


def _label_row(row: Row, where: str) -> Example:
    label = next((row[name] for name in LABEL_COLUMNS if row.get(name) is not None), None)
    if not isinstance(label, str | int) or isinstance(label, bool):
        raise ConfigError(
            "a row has no label",
            where=where,
            found=", ".join(map(str, row))[:200] or "nothing",
            expected="the text of a row and its label",
        )
    return Example(
        {key: value for key, value in row.items() if key not in LABEL_COLUMNS and key != "adapter"},
        str(label),
    )
