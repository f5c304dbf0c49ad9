"""Measures labels: one a row, any number of them, or a number, of texts, images and recordings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ...tasks.data.problems import ANY, LABEL_COLUMNS, NUMBER, ONE
from ...tasks.data.report import DataReport
from ...tasks.data.rows import Row
from ...tasks.text_classification import columns_of, texts_of
from ...training.loop.media import content_of
from ..evaluation import (
    EVALUATIONS,
    EvaluatedModel,
    Evaluation,
    EvaluationRow,
    Judgement,
    RowReply,
    read_rows,
)
from ..measures import Measure, of_sums, pearson, ratio, spearman

Judge = Callable[[Sequence[Any], Sequence[Mapping[str, Any]], Sequence[str]], Judgement]
"""(right answers, results, labels) -> the judgement."""


def _read_texts(rows: Any, report: DataReport, model: EvaluatedModel) -> list[EvaluationRow]:
    columns, label = columns_of(rows, report)

    def read(row: Row, place: object) -> tuple[Any, ...]:
        texts = texts_of(row, columns, place)
        asked = dict(zip(("text", "text_pair"), texts, strict=False))
        return "\n".join(texts), _known(model, row[label], place), (asked,)

    return read_rows(rows, report, read)


def _read_files(column: str, rows: Any, report: DataReport, model: EvaluatedModel) -> list[EvaluationRow]:
    label = report.read_pair(rows.column_names, column, LABEL_COLUMNS, "classification needs")

    def read(row: Row, place: object) -> tuple[Any, ...]:
        file = content_of(row[column], place, column, "the path of a file")
        return file_name(file), _known(model, row[label], place), ({column: file},)

    return read_rows(rows, report, read)


def file_name(file: str | bytes) -> str:
    """Returns what people read of a file in a row of data."""
    return file[:200] if isinstance(file, str) else f"{len(file)} bytes"


def _known(model: EvaluatedModel, label: Any, place: object) -> Any:
    """Returns the label of a row, if the model has it."""
    assert model.labels is not None
    model.labels.target(label, place)
    return label


def _judge(
    rows: Sequence[EvaluationRow],
    replies: Sequence[RowReply],
    base: Sequence[RowReply] | None,
    model: EvaluatedModel,
) -> Judgement:
    assert model.labels is not None
    judge = _JUDGES[model.labels.problem.name]
    return judge([row.expected for row in rows], [reply.results[0] for reply in replies], model.labels.names)


def _one(expected: Sequence[Any], results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Judgement:
    labels, answers = [*map(str, expected)], [result["label"] for result in results]
    wanted, given = (
        np.array([[name == one for name in names] for one in some]) for some in (labels, answers)
    )
    right = (wanted & given).any(1).astype(float)
    likely = np.array([result["scores"][one] for result, one in zip(results, labels, strict=True)])
    return Judgement(
        [ratio("accuracy", right), f1_of_labels("macro_f1", given, wanted, used_only=True)],
        {"right": right, "probability": likely},
        1 - likely - 2 * right,
        answers,
        confusion(names, labels, answers),
    )


def _any(expected: Sequence[Any], results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Judgement:
    wanted, given = (
        np.array([[name in row for name in names] for row in rows])
        for rows in ([[*map(str, labels)] for labels in expected], [result["labels"] for result in results])
    )
    both, all_ = (wanted & given).sum(1), wanted.sum(1) + given.sum(1)
    f1 = np.where(all_, 2 * both / np.maximum(all_, 1), 1.0)
    return Judgement(
        [
            ratio("f1", 2 * both, all_),
            f1_of_labels("macro_f1", given, wanted),
            ratio("accuracy", (wanted == given).all(1).astype(float)),
        ],
        {"f1": f1},
        -f1,
        [result["labels"] for result in results],
    )


def _number(expected: Sequence[Any], results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Judgement:
    wanted = np.array(expected, float)
    given = np.array([result["scores"][names[0]] for result in results], float)
    error = (given - wanted) ** 2
    return Judgement(
        [
            ratio("mse", error, more_is_better=False),
            pearson("pearson", given, wanted),
            spearman("spearman", given, wanted),
        ],
        {"squared_error": error},
        error,
        given.tolist(),
    )


def confusion(
    names: Sequence[str], wanted: Sequence[str], given: Sequence[str]
) -> tuple[Sequence[str], np.ndarray]:
    """Returns the labels, and how often each (row) was answered by each (column).

    Example:
        >>> confusion(["no", "yes"], ["no", "no"], ["no", "yes"])[1].tolist()
        [[1, 1], [0, 0]]
    """
    place, counts = {name: at for at, name in enumerate(names)}, np.zeros((len(names), len(names)), int)
    for right, answer in zip(wanted, given, strict=True):
        if answer in place:
            counts[place[right], place[answer]] += 1
    return names, counts


def f1_of_labels(name: str, given: np.ndarray, wanted: np.ndarray, used_only: bool = False) -> Measure:
    """Returns the mean over labels of F1, from what was given and wanted ``[rows, labels]``; with
    ``used_only`` over the labels that a draw has, else a label that it does not have counts 0.
    """

    def value(both: np.ndarray, all_: np.ndarray) -> np.ndarray:
        f1 = np.where(all_ > 0, 2 * both / np.maximum(all_, 1), 0.0)
        mean: np.ndarray = f1.sum(-1) / (np.maximum((all_ > 0).sum(-1), 1) if used_only else f1.shape[-1])
        return mean

    return of_sums(name, (given & wanted, given * 1 + wanted), value)


_JUDGES: dict[str, Judge] = {ONE.name: _one, ANY.name: _any, NUMBER.name: _number}
EVALUATIONS.register(Evaluation("classification", ("text-classification",), _read_texts, _judge))
EVALUATIONS.register(Evaluation("images", ("image-classification",), partial(_read_files, "image"), _judge))
EVALUATIONS.register(
    Evaluation("recordings", ("audio-classification",), partial(_read_files, "audio"), _judge)
)
