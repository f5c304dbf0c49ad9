"""Measures the labels of words, by the entities that they mark."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np

from ...tasks.data import DataReport, Row
from ...tasks.token_classification import OUTSIDE, entities, label_column, words_and_labels
from .. import (
    EVALUATIONS,
    AnsweredRows,
    EvaluatedModel,
    Evaluation,
    Judgement,
    RowParts,
    RowReader,
    ratio,
    read_rows,
    target_of,
)
from .classification import confusion


def _read(rows: Any, report: DataReport) -> RowReader:
    column = label_column(rows, report)

    def read(model: EvaluatedModel, row: Row, place: object) -> RowParts:
        words, tags = words_and_labels(row, column, place)
        for tag in tags:
            target_of(model, tag, place)
        text = " ".join(words)
        ends = accumulate(len(word) + 1 for word in words)
        spans = [(end - 1 - len(word), end - 1) for word, end in zip(words, ends, strict=True)]
        return ({"text": text},), text, " ".join(map(str, tags)), spans

    return read_rows(rows, report, read)


def _judge(rows: AnsweredRows) -> Judgement:
    right = [text.split() for text in rows.expected]
    answers = [
        labels_of_words(result["tokens"], row.known)
        for result, row in zip(rows.results, rows.rows, strict=True)
    ]
    pairs = [*zip(right, answers, strict=True)]
    sets = [(entities(one), entities(two)) for one, two in pairs]
    both, wanted, given = np.array([(len(one & two), len(one), len(two)) for one, two in sets]).T
    same = np.array([sum(map(str.__eq__, *pair)) for pair in pairs])
    lengths = np.array([*map(len, right)])
    assert rows.model.labels is not None
    return Judgement(
        [
            ratio("f1", 2 * both, wanted + given),
            ratio("precision", both, given),
            ratio("recall", both, wanted),
            ratio("accuracy", same, lengths),
        ],
        {"missed": wanted - both, "invented": given - both},
        wanted + given - 2 * both - same / lengths,
        [" ".join(tags) for tags in answers],
        confusion(rows.model.labels.names, [*chain(*right)], [*chain(*answers)]),
    )


def labels_of_words(tokens: Sequence[Any], spans: Sequence[tuple[int, int]]) -> list[str]:
    """Returns the label of each word: that of its first token.

    Example:
        >>> labels_of_words([{"start": 0, "end": 2, "label": "B-PER"}], [(0, 4), (5, 7)])
        ['B-PER', 'O']
    """
    return [
        next((one["label"] for one in tokens if one["end"] > start and one["start"] < end), OUTSIDE)
        for start, end in spans
    ]


EVALUATIONS.register(Evaluation("words", ("token-classification",), _read, _judge))
