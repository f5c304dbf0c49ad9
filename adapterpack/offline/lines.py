"""Reads the lines of a JSONL file one by one, each with its place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

from ..errors import AdapterpackError, ConfigError, storage_errors
from ..io import Json
from ..io.strict_json import require_few_parts
from ..library_errors import library_errors

MAX_LINE = 64 << 20
MAX_DEPTH = 100
_MOST_SKIPPED = 16
"""After a line longer than this many times ``MAX_LINE``, reading stops."""


REQUEST = frozenset({"custom_id", "method", "url", "body"})
"""The keys of a line in OpenAI's batch format."""


class Line(NamedTuple):
    """A line that is not empty: its number, the offset of its end in the file, and its object, or the error
    of an invalid line.
    """

    number: int
    end: int
    row: Json | AdapterpackError


def is_request(row: object) -> bool:
    """Returns whether a line is a request in OpenAI's batch format."""
    return isinstance(row, dict) and row.keys() >= REQUEST


def lines_of(file: IO[bytes], where: str, number: int = 0, end: int = 0) -> Iterator[Line]:
    """Yields the lines of a file from its current position, which follows ``number`` lines and ``end`` bytes.

    Raises:
        StorageError: the file cannot be read.
    """
    while text := _read(file, where):
        number = number + 1
        end = end + len(text)
        if len(text) <= MAX_LINE:
            if text.strip():
                yield Line(number, end, _row_of(text, f"{where}, line {number}"))
            continue
        yield Line(
            number,
            end,
            ConfigError(
                "this line is too long",
                where=f"{where}, line {number}",
                expected=f"at most {MAX_LINE} bytes",
                remedy="write one object a line",
            ),
        )
        for _ in range(_MOST_SKIPPED):
            if text.endswith(b"\n") or not text:
                break
            text = _read(file, where)
            end += len(text)
        else:
            return


def _read(file: IO[bytes], where: str) -> bytes:
    with storage_errors(where):
        return file.readline(MAX_LINE + 1)


def _row_of(text: bytes, where: str) -> Json | AdapterpackError:
    try:
        return _row(text, where)
    except AdapterpackError as error:
        return error


def _row(text: bytes, where: str) -> Json:
    require_few_parts(text, where, 1 << 24)
    with library_errors(
        "json",
        "this line is not JSON",
        where=where,
        remedy="give a JSONL file: one object a line",
        kind=ConfigError,
    ):
        row = json.loads(text.decode("utf-8-sig"))
    if not isinstance(row, dict):
        raise ConfigError(
            "a row must be an object", where=where, found=type(row).__name__, remedy="write one object a line"
        )
    level: list[Any] = [row]
    for _ in range(MAX_DEPTH):
        level = [item for value in level for item in _inside(value)]
    if level:
        raise ConfigError("the row is nested too deeply", where=where, expected=f"at most {MAX_DEPTH} levels")
    return row


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
