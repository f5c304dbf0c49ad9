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

Picture = str | Path | bytes | bytearray | memoryview | np.ndarray
"""How an image is given: a path of a picture or a ``.npy`` file, ``data:image/...``, the bytes of a picture,
or what a processor made.
"""

PROMPTS = ("messages", "prompt", "text")
"""The columns of a prompt; of several the first counts."""
COLUMNS: Mapping[str, Any] = {
    "text": str | list,
    "prompt": str | list,
    "messages": str | list,
    "image": Picture,
    "audio": str | Path,
    "question": str | list,
}
"""Column -> the types of its values; every row has at least one of these, or of those that its task adds."""

_Row = TypeVar("_Row")
_Result = TypeVar("_Result")


class RowError(ConfigError):
    """A row that cannot be run. ``row`` counts from 1. ``place`` is where the row comes from, if more is
    known of it than its number, and ``inside`` what in the row is wrong, such as a file that it names.
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
        """The same error of a row with another number, or from another place."""
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
    """Names the row in the errors of the block."""
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
    """Renumbers the errors of rows that are some of a request's: ``numbers`` are their numbers among all
    rows, in order.
    """
    try:
        yield
    except RowError as error:
        raise error.moved(numbers[error.row - 1]) from error


def map_rows(rows: Iterable[_Row], function: Callable[[_Row], _Result]) -> list[_Result]:
    """The function's result for each row, with the row's number in an error.

    Raises:
        RowError: it refuses one.
    """
    results = []
    for number, row in enumerate(rows, 1):
        with row_errors(number):
            results.append(function(row))
    return results


def text_of(row: Row) -> str:
    """The text of a row.

    Raises:
        ConfigError: it has none.
    """
    text = row.get("text", row.get("prompt"))
    if not isinstance(text, str):
        raise ConfigError("a row of this task needs text", found=", ".join(map(str, row)))
    return text


def words_of(value: Any) -> Any:
    """A list of words or of their labels, as it is or from a text with spaces between them, as a CSV or TSV
    file holds one.

    Example:
        >>> words_of("PER O LOC"), words_of(["PER", "O"])
        (['PER', 'O', 'LOC'], ['PER', 'O'])
    """
    return value.split() if isinstance(value, str) else value


def prompt_of(row: Row) -> Any:
    """The prompt of a row: a text, or a list of messages.

    Raises:
        ConfigError: it has none.
    """
    for column in PROMPTS:
        if isinstance(row.get(column), str | list):
            return row[column]
    raise ConfigError("a row of this task needs prompt, text or messages", found=", ".join(map(str, row)))


def file_of(row: Row, column: str) -> Any:
    """The ``image`` or ``audio`` of a row.

    Raises:
        ConfigError: it has none.
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
    """The token types of an encoded row, where its tokenizer tells two texts apart by them."""
    return {"token_type_ids": tokens["token_type_ids"]} if "token_type_ids" in tokens else {}
