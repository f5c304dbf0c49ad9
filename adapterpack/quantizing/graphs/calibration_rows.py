"""Reads calibration rows: tokenizes the texts of a JSONL file, up to the number and length that calibration
needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ...errors import AdapterpackError, ConfigError, Unsupported, storage_errors
from ...offline.lines import lines_of
from ...runtime import Session
from ...tasks.data import Row

MOST_ROWS, MOST_TOKENS = 128, 512
"""The most rows, and the most tokens of a row; the rest is ignored."""


def token_rows(session: Session, file: Path) -> list[tuple[list[int], int]]:
    """Returns the rows of a file as token ids, each with the number of tokens before the answer. A row has a
    ``text``, ``messages``, or a ``prompt`` and its ``completion``.

    Raises:
        StorageError: the file cannot be read.
        ConfigError: a line is not a row or has no text, or the file has no rows.
        Unsupported: the bundle's model does not read text alone.
    """
    if len(session.task.parts) > 1 or "input_ids" not in session.task.main.inputs:
        raise Unsupported(
            "calibration rows are texts for a model of one graph",
            where=session.folder.name,
            found=session.task.name,
            remedy="choose --algorithm rtn, k-quant or hqq",
        )
    return [
        (ids[:MOST_TOKENS], min(given, MOST_TOKENS))
        for ids, given in (encode_row(session, row, where) for row, where in read_rows(file))
    ]


def read_rows(file: Path) -> Iterator[tuple[Row, str]]:
    """Yields the first :data:`MOST_ROWS` rows of a file, each with its position for error messages.

    Raises:
        StorageError: the file cannot be read.
        ConfigError: a line is not a row, or the file has no rows.
    """
    count = 0
    with storage_errors(file), file.open("rb") as opened:
        for line in islice(lines_of(opened, file.name), MOST_ROWS):
            if isinstance(line.row, AdapterpackError):
                raise line.row
            count += 1
            yield line.row, f"{file.name}, line {line.number}"
    if not count:
        raise ConfigError("the file has no rows", where=file, remedy="write one object a line")


def encode_row(session: Session, row: Row, where: str) -> tuple[list[int], int]:
    """Returns the tokens of a row, and how many of them precede the answer.

    Raises:
        ConfigError: the row has no text.
    """
    tokenizer = session.tokenizer
    if isinstance(text := row.get("text"), str) and text:
        return tokenizer.row(text), 0
    if isinstance(row.get("prompt"), str) or isinstance(row.get("messages"), list):
        prompt = tokenizer.prompt(row["prompt"] if isinstance(row.get("prompt"), str) else row["messages"])
        completion = row.get("completion")
        return prompt + (
            tokenizer.encode(completion, special=False) if isinstance(completion, str) else []
        ), len(prompt)
    raise ConfigError(
        "a row has no text",
        where=where,
        found=", ".join(row)[:200] or "nothing",
        expected="text, messages, or prompt and completion",
    )
