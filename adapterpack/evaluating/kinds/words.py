"""Measures the labels of words, by the entities that they mark."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np

from ...tasks.data.report import DataReport
from ...tasks.data.rows import Row
from ...tasks.token_classification import label_column, words_and_labels
from ..evaluation import (
    EVALUATIONS,
    EvaluatedModel,
    Evaluation,
    EvaluationRow,
    Judgement,
    RowReply,
    read_rows,
)
from ..measures import ratio
from .classification import confusion

OUTSIDE = "O"
_MARKS = "BIESLU"
"""The marks of a label before its type, in IOB2, IOBES and BILOU."""


def _read(rows: Any, report: DataReport, model: EvaluatedModel) -> list[EvaluationRow]:
    column = label_column(rows, report)

    def read(row: Row, place: object) -> tuple[Any, ...]:
        words, tags = words_and_labels(row, column, place)
        assert model.labels is not None
        for tag in tags:
            model.labels.target(tag, place)
        text = " ".join(words)
        ends = accumulate(len(word) + 1 for word in words)
        spans = [(end - 1 - len(word), end - 1) for word, end in zip(words, ends, strict=True)]
        return text, (spans, [*map(str, tags)]), ({"text": text},)

    return read_rows(rows, report, read)


def _judge(
    rows: Sequence[EvaluationRow], replies: Sequence[RowReply], base: object, model: EvaluatedModel
) -> Judgement:
    answers = [
        labels_of_words(reply.results[0]["tokens"], row.expected[0])
        for row, reply in zip(rows, replies, strict=True)
    ]
    right = [row.expected[1] for row in rows]
    sets = [(entities(wanted), entities(given)) for wanted, given in zip(right, answers, strict=True)]
    both, wanted, given = (
        np.array(counts, float)
        for counts in zip(*((len(one & two), len(one), len(two)) for one, two in sets), strict=True)
    )
    same = np.array([sum(map(str.__eq__, *pair)) for pair in zip(right, answers, strict=True)], float)
    lengths = np.array([*map(len, right)], float)
    assert model.labels is not None
    return Judgement(
        [
            ratio("f1", 2 * both, wanted + given),
            ratio("precision", both, given),
            ratio("recall", both, wanted),
            ratio("accuracy", same, lengths),
        ],
        {"missed": wanted - both, "invented": given - both},
        wanted + given - 2 * both + (lengths - same) / lengths.max(),
        [" ".join(tags) for tags in answers],
        confusion(model.labels.names, [*chain(*right)], [*chain(*answers)]),
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


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Returns the entities that labels mark, each with its type, first and last word, as conlleval and
    seqeval count them: one begins at a mark that begins, or where the type changes. A label without a mark is
    a type.

    Example:
        >>> sorted(entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
        [('LOC', 3, 3), ('LOC', 4, 4), ('PER', 0, 1)]
    """
    found, start, before = set(), 0, (OUTSIDE, "")
    for at, tag in enumerate([*tags, OUTSIDE]):
        marked = tag[0] in _MARKS and tag[1:2] in ("", "-")
        now = (tag, "") if tag == OUTSIDE else (tag[0], tag[2:]) if marked else ("I", tag)
        begins = now[0] != OUTSIDE and (now[0] in "BSU" or before[0] in "OESLU" or now[1] != before[1])
        if before[0] != OUTSIDE and (begins or now[0] == OUTSIDE):
            found.add((before[1], start, at - 1))
        start, before = at if begins else start, now
    return found


EVALUATIONS.register(Evaluation("words", ("token-classification",), _read, _judge))
