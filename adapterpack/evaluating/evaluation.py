"""Defines a kind of evaluation (:class:`Evaluation`): what is asked about a row of data, and how the answers
are measured; and the registry of kinds.

Another package provides a kind through an entry point of the group ``adapterpack.evaluations``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError, Unsupported
from ..registry import Registry
from ..runtime import Session
from ..tasks import Task
from ..tasks.data import DataReport, Labels, Row
from ..torch_adapters import load_tokenizer
from ..training.loop.media import Media, content_of
from .measures import Measure

Result = Mapping[str, Any]
"""What a model gives for one row."""


class EvaluatedModel(NamedTuple):
    """One adapter of a running bundle, None for the base, and the labels of its head. Rows are cut at
    ``max_length`` tokens where their likelihood is measured.
    """

    session: Session
    adapter: str | None
    labels: Labels | None
    max_length: int

    @property
    def tokenizer(self) -> Any:
        """The tokenizer as training uses it."""
        session = self.session
        return session.once("transformers' tokenizer", lambda: load_tokenizer(session.folder))

    @property
    def media(self) -> Media:
        """The reader of images and recordings as training uses it."""
        session = self.session
        return session.once("training's media", lambda: Media(session.folder, session.task))


class EvaluationRow(NamedTuple):
    """A row of data: the rows to run for it, and what is right.

    Args:
        number: its number in the data, from 1.
        place: where it is, for errors.
        asked: rows as :func:`adapterpack.run` takes them.
        shown: what people read of it.
        expected: the right answer, as people read it.
        known: what else the judge needs.
        scored: encoded texts, as training reads them, whose likelihood is measured.
    """

    number: int
    place: object
    asked: tuple[Row, ...]
    shown: str
    expected: Any
    known: Any = None
    scored: tuple[Mapping[str, Sequence[int]], ...] = ()


class RowReply(NamedTuple):
    """What a model gave for a row: the results of what was asked, and the negative log-likelihood and the
    number of learned tokens of each text that was scored.
    """

    results: Sequence[Result]
    losses: Sequence[tuple[float, int]] = ()


class AnsweredRows(NamedTuple):
    """Rows, what a model replied to each, and what the base did, where it was measured."""

    rows: Sequence[EvaluationRow]
    replies: Sequence[RowReply]
    base: Sequence[RowReply] | None
    model: EvaluatedModel

    @property
    def results(self) -> list[Result]:
        """The first result of each row."""
        return [reply.results[0] for reply in self.replies]

    @property
    def expected(self) -> list[Any]:
        """The right answer to each row."""
        return [row.expected for row in self.rows]


class Judgement(NamedTuple):
    """What all rows show of a model.

    Args:
        measures: the measures, the most important first.
        rows: figure -> its value of each row.
        badness: how wrong each row is.
        answers: the answer to each row, as people read it.
        confusion: the labels, and how often each (row) was answered by each (column).
    """

    measures: Sequence[Measure]
    rows: Mapping[str, np.ndarray]
    badness: np.ndarray
    answers: Sequence[Any]
    confusion: tuple[Sequence[str], np.ndarray] | None = None


RowReader = Callable[[EvaluatedModel], list[EvaluationRow]]
ReadRows = Callable[[Any, DataReport], RowReader]
"""(table, its report) -> a model -> the rows. The columns are checked before there is a model; the report
excludes rows that cannot be read.
"""


@dataclass(frozen=True)
class Evaluation:
    """One kind of evaluation.

    Args:
        name: its name.
        tasks: the tasks whose bundles it measures.
        read: reads a table of rows.
        judge: measures the answers.
        columns: columns that tell it from other kinds of the task.
        options: the options with which rows are run, where the user gives none.
        reduce: makes of a row's result what the judge needs of it, where that is far smaller.
    """

    name: str
    tasks: tuple[str, ...]
    read: ReadRows
    judge: Callable[[AnsweredRows], Judgement]
    columns: frozenset[str] = frozenset()
    options: Callable[[Session, Sequence[EvaluationRow]], Mapping[str, Any]] = lambda session, rows: {}
    reduce: Callable[[EvaluatedModel, EvaluationRow, Result], Result] = lambda model, row, result: result


EVALUATIONS: Registry[Evaluation] = Registry(
    "evaluation", Evaluation, "adapterpack.evaluations", f"{__package__}.kinds"
)
"""Name -> kind of evaluation."""


def evaluation_of(task: Task, columns: Sequence[str]) -> Evaluation:
    """Returns the kind of evaluation for rows with these columns: of those of the task whose columns are
    present, the one that needs most.

    Raises:
        Unsupported: the task has no measures.
    """
    kinds = [one for one in EVALUATIONS.values() if task.name in one.tasks and one.columns <= {*columns}]
    if not kinds:
        measured = sorted({name for kind in EVALUATIONS.values() for name in kind.tasks})
        raise Unsupported(
            "answers of this task are not measured", found=task.name, expected=", ".join(measured)
        )
    return max(kinds, key=lambda kind: len(kind.columns))


RowParts = tuple[Any, ...]
"""What follows the number and the place of a row in an :class:`EvaluationRow`."""


def read_rows(
    rows: Any, report: DataReport, read: Callable[[EvaluatedModel, Row, object], RowParts]
) -> RowReader:
    """Returns the reader of a table's rows for a model. ``read`` makes them of a model, a row and its
    place; rows that it refuses are left out as the report says.
    """

    def read_all(model: EvaluatedModel) -> list[EvaluationRow]:
        made = []
        for number, row in enumerate(rows, 1):
            with report.row(number - 1) as place:
                made.append(EvaluationRow(number, place, *read(model, row, place)))
        return made

    return read_all


Right = Callable[[EvaluatedModel, Row, str, object], RowParts]
"""(a model, a row, the column of the right answer, the row's place) -> the answer, and what else is known."""


def read_files(column: str, others: Sequence[str], right: Right) -> ReadRows:
    """Returns a reader of rows with a file in one column and the right answer in the first of ``others``."""

    def read_table(rows: Any, report: DataReport) -> RowReader:
        other = report.read_pair(rows.column_names, column, others, "this task needs")

        def read(model: EvaluatedModel, row: Row, place: object) -> RowParts:
            file = content_of(row[column], place, column, "the path of a file")
            shown = file if isinstance(file, str) else f"{len(file)} bytes"
            return ({column: file},), shown[:200], *right(model, row, other, place)

        return read_rows(rows, report, read)

    return read_table


def target_of(model: EvaluatedModel, label: Any, place: object) -> Any:
    """Returns the target of a label in a row.

    Raises:
        ConfigError: the model does not have it.
    """
    assert model.labels is not None
    return model.labels.target(label, place)


def text_in(model: EvaluatedModel, row: Row, column: str, place: object) -> tuple[str]:
    """Returns the text of a row in a column.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(row[column], str):
        raise ConfigError("a row without text", where=place, found=f"{column}: {row[column]!r:.80}")
    return (row[column],)
