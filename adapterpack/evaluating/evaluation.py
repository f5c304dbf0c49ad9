"""Defines a kind of evaluation (:class:`Evaluation`): what is asked about a row of data, and how the answers
are measured; and the registry of kinds.

Another package provides a kind through an entry point of the group ``adapterpack.evaluations``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..errors import Unsupported
from ..registry import Registry
from ..runtime.sessions.session import Session
from ..tasks.data.problems import Labels
from ..tasks.data.report import DataReport
from ..tasks.data.rows import Row
from ..tasks.task import Task
from ..torch_adapters.models.load import load_tokenizer
from .measures import Measure


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


class EvaluationRow(NamedTuple):
    """A row of data: the rows to run for it, and what is right.

    Args:
        number: its number in the data, from 1.
        place: where it is, for errors.
        shown: what people read of it.
        expected: the right answer.
        asked: rows as :func:`adapterpack.run` takes them.
        scored: encoded texts, as training reads them, whose likelihood is measured.
    """

    number: int
    place: object
    shown: str
    expected: Any
    asked: tuple[Row, ...] = ()
    scored: tuple[Mapping[str, Sequence[int]], ...] = ()


class RowReply(NamedTuple):
    """What a model gave for a row: the results of what was asked, and the negative log-likelihood and the
    number of learned tokens of each text that was scored.
    """

    results: Sequence[Mapping[str, Any]]
    losses: Sequence[tuple[float, int]]


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


def _no_options(model: EvaluatedModel, rows: Sequence[EvaluationRow]) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Evaluation:
    """One kind of evaluation.

    Args:
        name: its name.
        tasks: the tasks whose bundles it measures.
        read: reads a table of rows; its report excludes rows that cannot be read.
        judge: (rows, a reply to each, the replies of the base where it was measured, the model) -> the
            judgement.
        columns: columns that tell it from other kinds of the task.
        options: the options with which rows are run, where the user gives none.
    """

    name: str
    tasks: tuple[str, ...]
    read: Callable[[Any, DataReport, EvaluatedModel], list[EvaluationRow]]
    judge: Callable[
        [Sequence[EvaluationRow], Sequence[RowReply], Sequence[RowReply] | None, EvaluatedModel], Judgement
    ]
    columns: frozenset[str] = frozenset()
    options: Callable[[EvaluatedModel, Sequence[EvaluationRow]], Mapping[str, Any]] = _no_options


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
    kinds = [kind for kind in EVALUATIONS.values() if task.name in kind.tasks]
    fitting = [kind for kind in kinds if kind.columns <= {*columns}]
    if not fitting:
        raise Unsupported(
            "answers of this task are not measured",
            where=task.name,
            found=", ".join(columns),
            expected=", or ".join(sorted({" + ".join(sorted(kind.columns)) for kind in kinds}))
            or f"one of {', '.join(sorted({name for kind in EVALUATIONS.values() for name in kind.tasks}))}",
        )
    return max(fitting, key=lambda kind: len(kind.columns))


def read_rows(
    rows: Any, report: DataReport, read: Callable[[Row, object], tuple[Any, ...]]
) -> list[EvaluationRow]:
    """Returns the rows of a table. ``read`` makes of a row and its place what follows the place in an
    :class:`EvaluationRow`; rows that it refuses are left out as the report says.
    """
    made = []
    for number, row in enumerate(rows, 1):
        with report.row(number - 1) as place:
            made.append(EvaluationRow(number, place, *read(row, place)))
    return made
