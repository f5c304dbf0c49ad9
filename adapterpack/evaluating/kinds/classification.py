"""Measures labels: one a row, any number of them, or a number, of texts, images and recordings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...tasks.data import LABEL_COLUMNS, NUMBER, ONE, DataReport, Row
from ...tasks.data.problems import ANY
from ...tasks.text_classification import columns_of, texts_of
from .. import (
    EVALUATIONS,
    AnsweredRows,
    EvaluatedModel,
    Evaluation,
    Judgement,
    Measure,
    RowParts,
    RowReader,
    of_sums,
    pearson,
    ratio,
    read_files,
    read_rows,
    spearman,
    target_of,
)


def _read_texts(rows: Any, report: DataReport) -> RowReader:
    columns, label = columns_of(rows, report)

    def read(model: EvaluatedModel, row: Row, place: object) -> RowParts:
        texts = texts_of(row, columns, place)
        asked = dict(zip(("text", "text_pair"), texts, strict=False))
        return (asked,), "\n".join(texts), *_label(model, row, label, place)

    return read_rows(rows, report, read)


def _label(model: EvaluatedModel, row: Row, column: str, place: object) -> tuple[Any]:
    target_of(model, row[column], place)
    return (row[column],)


def _judge(given: AnsweredRows) -> Judgement:
    assert given.model.labels is not None
    return _JUDGES[given.model.labels.problem.name](given, given.model.labels.names)


def _one(rows: AnsweredRows, names: Sequence[str]) -> Judgement:
    labels = [*map(str, rows.expected)]
    answers = [result["label"] for result in rows.results]
    wanted, given = (np.array(some)[:, None] == [*names] for some in (labels, answers))
    right = (wanted & given).any(1)
    likely = np.array([result["scores"][one] for result, one in zip(rows.results, labels, strict=True)])
    return Judgement(
        [ratio("accuracy", right), f1_of_labels(given, wanted, used_only=True)],
        {"right": right, "probability": likely},
        1 - likely - 2 * right,
        answers,
        confusion(names, labels, answers),
    )


def _any(rows: AnsweredRows, names: Sequence[str]) -> Judgement:
    answers = [result["labels"] for result in rows.results]
    wanted, given = (
        np.array([[name in row for name in names] for row in some])
        for some in ([[*map(str, labels)] for labels in rows.expected], answers)
    )
    both = (wanted & given).sum(1)
    every = wanted.sum(1) + given.sum(1)
    f1 = np.where(every, 2 * both / np.maximum(every, 1), 1.0)
    same = (wanted == given).all(1)
    measures = [ratio("f1", 2 * both, every), f1_of_labels(given, wanted), ratio("accuracy", same)]
    return Judgement(measures, {"f1": f1}, -f1, answers)


def _number(rows: AnsweredRows, names: Sequence[str]) -> Judgement:
    given = np.array([result["scores"][names[0]] for result in rows.results])
    wanted = np.array(rows.expected, float)
    error = (given - wanted) ** 2
    correlations = pearson(given, wanted), spearman(given, wanted)
    measures = [ratio("mse", error, more_is_better=False), *correlations]
    return Judgement(measures, {"squared_error": error}, error, given.tolist())


_JUDGES: dict[str, Callable[[AnsweredRows, Sequence[str]], Judgement]] = {
    ONE.name: _one,
    ANY.name: _any,
    NUMBER.name: _number,
}


def confusion(
    names: Sequence[str], wanted: Sequence[str], given: Sequence[str]
) -> tuple[Sequence[str], np.ndarray]:
    """Returns the labels, and how often each (row) was answered by each (column).

    Example:
        >>> confusion(["no", "yes"], ["no", "no"], ["no", "yes"])[1].tolist()
        [[1, 1], [0, 0]]
    """
    place = {name: at for at, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)), int)
    for right, answer in zip(wanted, given, strict=True):
        if answer in place:
            counts[place[right], place[answer]] += 1
    return names, counts


def f1_of_labels(given: np.ndarray, wanted: np.ndarray, used_only: bool = False) -> Measure:
    """Returns the mean over labels of F1, from what was given and wanted ``[rows, labels]``; with
    ``used_only`` over the labels that a draw has, else a label that it does not have counts 0.
    """

    def value(both: np.ndarray, every: np.ndarray) -> float:
        f1 = 2 * both / np.maximum(every, 1)
        return float(f1.sum() / ((every > 0).sum() if used_only else len(f1)))

    return of_sums("macro_f1", (given & wanted, given * 1 + wanted), value)


for _name, _task, _read in (
    ("labels-of-texts", "text-classification", _read_texts),
    ("labels-of-images", "image-classification", read_files("image", LABEL_COLUMNS, _label)),
    ("labels-of-sounds", "audio-classification", read_files("audio", LABEL_COLUMNS, _label)),
):
    EVALUATIONS.register(Evaluation(_name, (_task,), _read, _judge))
