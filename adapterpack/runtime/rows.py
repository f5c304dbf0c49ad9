"""Errors of one row among several: they name the row, so that whoever gave it finds it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from ..errors import ConfigError

_Row = TypeVar("_Row")
_Result = TypeVar("_Result")


class RowError(ConfigError):
    """A row that cannot be run. ``row`` counts from 1. ``place`` is where the row comes from, if more is known of it than its number, and
    ``inside`` what in the row is wrong, such as a file that it names."""

    def __init__(self, what: str, *, row: int, place: str | None = None, inside: str | None = None, expected: object = None,
                 found: object = None, remedy: str | None = None) -> None:
        where = ", ".join(filter(None, (place or f"row {row}", inside)))
        super().__init__(what, where=where, expected=expected, found=found, remedy=remedy)
        self.row, self.inside = row, inside

    def moved(self, row: int, place: str | None = None) -> RowError:
        """The same error of a row with another number, or from another place."""
        return RowError(self.what, row=row, place=place, inside=self.inside, expected=self.expected, found=self.found, remedy=self.remedy)


@contextmanager
def row_errors(row: int) -> Iterator[None]:
    """What is wrong with a row says which one it is."""
    try:
        yield
    except RowError:
        raise
    except ConfigError as error:
        raise RowError(error.what, row=row, inside=error.where, expected=error.expected, found=error.found, remedy=error.remedy) from error


@contextmanager
def among(numbers: Sequence[int]) -> Iterator[None]:
    """What is wrong with one of some rows names its number among all of them; ``numbers`` has those of the rows, in order."""
    try:
        yield
    except RowError as error:
        raise error.moved(numbers[error.row - 1]) from error


def each(rows: Iterable[_Row], function: Callable[[_Row], _Result]) -> list[_Result]:
    """What a function makes of each row.

    Raises:
        RowError: it refuses one.
    """
    results = []
    for number, row in enumerate(rows, 1):
        with row_errors(number):
            results.append(function(row))
    return results
