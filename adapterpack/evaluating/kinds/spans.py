"""Measures answers in texts, by the rules of SQuAD."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

import numpy as np

from ...tasks.data import DataReport, Row
from ...tasks.question_answering import is_flat, read_question
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
)

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _read(rows: Any, report: DataReport) -> RowReader:
    flat = is_flat(rows, report)

    def read(model: EvaluatedModel, row: Row, place: object) -> RowParts:
        question, context, *_ = read_question(row, flat, place)
        answers = [row["answer"] or ""] if flat else row["answers"]["text"] or [""]
        return ({"question": question, "context": context},), f"{question}\n{context}", answers

    return read_rows(rows, report, read)


def _judge(rows: AnsweredRows) -> Judgement:
    answers = [result["answer"] for result in rows.results]
    exact, f1 = (
        np.array(
            [
                max(alike(one, right) for right in some)
                for one, some in zip(answers, rows.expected, strict=True)
            ]
        )
        for alike in (same_words, word_f1)
    )
    figures = {"exact_match": exact, "f1": f1}
    return Judgement([ratio(*one) for one in figures.items()], figures, -f1 - exact, answers)


def words_of(text: str) -> list[str]:
    """Returns the words that SQuAD compares: in lower case, without punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def same_words(answer: str, right: str) -> float:
    """Returns 1 if two answers have the same words, else 0."""
    return float(words_of(answer) == words_of(right))


def word_f1(answer: str, right: str) -> float:
    """Returns F1 over the words of two answers (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250).

    Example:
        >>> word_f1("the red lamp", "lamp"), word_f1("", "")
        (0.6666666666666666, 1.0)
    """
    one, two = words_of(answer), words_of(right)
    both = (Counter(one) & Counter(two)).total()
    return 2 * both / (len(one) + len(two)) if one and two else same_words(answer, right)


EVALUATIONS.register(Evaluation("spans", ("question-answering",), _read, _judge))
