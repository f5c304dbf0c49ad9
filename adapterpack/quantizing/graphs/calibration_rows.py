"""Reads calibration rows: the texts of a JSONL file as token ids, as many of them and as long as calibration
needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import AdapterpackError, ConfigError, Unsupported, storage_errors
from ...offline.lines import lines_of
from ...runtime.sessions.session import Session

MOST_ROWS, MOST_TOKENS = 128, 512
"""Rows, and tokens of a row, that are looked at; what is behind them is left out."""


def token_rows(session: Session, file: Path) -> list[tuple[list[int], int]]:
    """The rows of a file as token ids, each with the number of tokens that are no answer: rows have a
    ``text``, ``messages``, or a ``prompt`` and its ``completion``.

    Raises:
        StorageError: the file cannot be read.
        ConfigError: a line is no row, or has no text; or there is no row.
        Unsupported: the model of the bundle reads no texts alone.
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


def read_rows(file: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The first :data:`MOST_ROWS` rows of a file, each with its place in words.

    Raises:
        StorageError: the file cannot be read.
        ConfigError: a line is no row, or there is none.
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


def encode_row(session: Session, row: Mapping[str, Any], where: str) -> tuple[list[int], int]:
    """The tokens of a row, and how many of them are no answer.

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
