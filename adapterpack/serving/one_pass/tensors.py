"""Converts results of rows to tensors: the output columns of each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ...tasks import RowInputs, width_of

Results = Sequence[Mapping[str, Any]]
Labels = Sequence[str] | None


class Column(NamedTuple):
    """One tensor: ``values`` extracts it from the results of all rows, as nested lists; ``extents`` returns
    its shape, with -1 for lengths that depend on the rows.
    """

    name: str
    datatype: str
    values: Callable[[Results], list[Any]]
    extents: Callable[[RowInputs, Labels], list[int]]


class Outputs(NamedTuple):
    """The tensors of a task, and whether its rows may be pairs of texts."""

    columns: tuple[Column, ...]
    pairs: bool = False


def _by_row(session: RowInputs, labels: Labels) -> list[int]:
    return [-1]


def _by_label(session: RowInputs, labels: Labels) -> list[int]:
    return [-1 if labels is None else len(labels)]


def _by_width(session: RowInputs, labels: Labels) -> list[int]:
    width = width_of(session)
    return [-1, width if isinstance(width, int) else -1]


def _of_tokens(name: str, datatype: str) -> Column:
    return Column(
        name, datatype, lambda results: [token[name] for row in results for token in row["tokens"]], _by_row
    )


OUTPUTS: dict[str, Outputs] = {
    "text-classification": Outputs(
        (
            Column("label", "BYTES", lambda results: [row["label"] for row in results], _by_row),
            Column(
                "scores",
                "FP32",
                lambda results: [list(row["scores"].values()) for row in results],
                lambda session, labels: [-1, *_by_label(session, labels)],
            ),
            Column("labels", "BYTES", lambda results: list(results[0]["scores"]), _by_label),
        ),
        True,
    ),
    "feature-extraction": Outputs(
        (Column("embedding", "FP32", lambda results: [row["embedding"] for row in results], _by_width),), True
    ),
    "token-classification": Outputs(
        (
            Column(
                "row",
                "INT64",
                lambda results: [place for place, row in enumerate(results) for _ in row["tokens"]],
                _by_row,
            ),
            *(
                _of_tokens(name, datatype)
                for name, datatype in (
                    ("start", "INT64"),
                    ("end", "INT64"),
                    ("label", "BYTES"),
                    ("score", "FP32"),
                )
            ),
        )
    ),
}
"""Task -> its tensors. ``labels`` names the columns of ``scores``. For token classification each tensor has
one value for each token of all rows, with the index of its ``row`` and its character range.
"""


def extents_of(values: Sequence[Any]) -> list[int]:
    """Returns the shape of nested lists.

    Example:
        >>> extents_of([[1.0, 2.0]]), extents_of([])
        ([1, 2], [0])
    """
    inner = extents_of(values[0]) if values and isinstance(values[0], list) else []
    return [len(values), *inner]


def flat(values: Sequence[Any]) -> list[Any]:
    """Flattens nested lists in row-major order.

    Example:
        >>> flat([[1, 2], [3, 4]])
        [1, 2, 3, 4]
    """
    return [value for item in values for value in (item if isinstance(item, list) else [item])]
