"""The rows of a request: the columns that they may have, how tasks read them, and errors that name the
row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ...errors import ConfigError, NonFinite

Row = Mapping[str, Any]
Encoded = dict[str, Any]
"""A row as training takes it: token ids or pixels, and targets."""
Result = dict[str, Any]
"""The answer to a row."""

Picture = str | Path | bytes | bytearray | memoryview | np.ndarray
"""The forms of an image: the path of a picture or a ``.npy`` file, ``data:image/...``, the bytes of a
picture, or the array from a processor.
"""

Recording = str | Path | bytes
"""The forms of a sound: the path of a wave or ``.npy`` file, ``data:audio/...``, or a wave file's bytes."""

PROMPTS = ("messages", "prompt", "text")
"""The columns that may hold a prompt; the first one present is used."""
COLUMNS: Mapping[str, Any] = {
    "text": str | list,
    "prompt": str | list,
    "messages": str | list,
    "image": Picture,
    "audio": Recording,
    "question": str | list,
}
"""Column -> the types of its values. Every row has at least one of these columns, or of those that its task
adds.
"""

_Row = TypeVar("_Row")
_Result = TypeVar("_Result")


class RowError(ConfigError):
    """A row that cannot be run. ``row`` counts from 1. ``place`` says where the row comes from, if more is
    known than its number; ``inside`` names what is wrong in the row, such as a file that it refers to.
    """

    def __init__(
        self,
        what: str,
        *,
        row: int,
        place: str | None = None,
        inside: str | None = None,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ) -> None:
        where = ", ".join(filter(None, (place or f"row {row}", inside)))
        super().__init__(what, where=where, expected=expected, found=found, remedy=remedy)
        self.row, self.inside = row, inside

    def moved(self, row: int, place: str | None = None) -> RowError:
        """Returns the same error for a row with another number or from another place."""
        return RowError(
            self.what,
            row=row,
            place=place,
            inside=self.inside,
            expected=self.expected,
            found=self.found,
            remedy=self.remedy,
        )


@contextmanager
def row_errors(row: int) -> Iterator[None]:
    """Adds the row's number to errors raised in the block."""
    try:
        yield
    except RowError:
        raise
    except (ConfigError, NonFinite) as error:
        raise RowError(
            error.what,
            row=row,
            inside=error.where,
            expected=error.expected,
            found=error.found,
            remedy=error.remedy,
        ) from error


@contextmanager
def among(numbers: Sequence[int]) -> Iterator[None]:
    """Renumbers the errors of rows that are a part of a request's rows; ``numbers`` are their numbers among
    all rows, in order.
    """
    try:
        yield
    except RowError as error:
        raise error.moved(numbers[error.row - 1]) from error


def map_rows(rows: Iterable[_Row], function: Callable[[_Row], _Result]) -> list[_Result]:
    """Returns the function's result for each row; an error names the row.

    Raises:
        RowError: the function refuses a row.
    """
    results = []
    for number, row in enumerate(rows, 1):
        with row_errors(number):
            results.append(function(row))
    return results


def text_of(row: Row) -> str:
    """Returns the text of a row.

    Raises:
        ConfigError: the row has no text.
    """
    text = row.get("text", row.get("prompt"))
    if not isinstance(text, str):
        raise ConfigError("a row of this task needs text", found=", ".join(map(str, row)))
    return text


def words_of(value: Any) -> Any:
    """Returns a list of words, or of their labels, given as a list or as a text with spaces between them, as
    in a CSV or TSV file.

    Example:
        >>> words_of("PER O LOC"), words_of(["PER", "O"])
        (['PER', 'O', 'LOC'], ['PER', 'O'])
    """
    return value.split() if isinstance(value, str) else value


def prompt_of(row: Row) -> Any:
    """Returns the prompt of a row: a text, or a list of messages.

    Raises:
        ConfigError: the row has no prompt.
    """
    for column in PROMPTS:
        if isinstance(row.get(column), str | list):
            return row[column]
    raise ConfigError("a row of this task needs prompt, text or messages", found=", ".join(map(str, row)))


def file_of(row: Row, column: str) -> Any:
    """Returns the ``image`` or ``audio`` of a row.

    Raises:
        ConfigError: the row does not have it.
    """
    value = row.get(column)
    if not isinstance(value, COLUMNS[column]):
        raise ConfigError(
            f"a row of this task needs {column}",
            found=", ".join(map(str, row)),
            expected="the path of a file",
        )
    return value


def types_of(tokens: Mapping[str, Any]) -> dict[str, list[int]]:
    """Returns the token types of an encoded row, if its tokenizer uses them to distinguish two texts."""
    return {"token_type_ids": tokens["token_type_ids"]} if "token_type_ids" in tokens else {}
