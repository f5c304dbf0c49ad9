"""Measures embeddings: whether each text or image is nearest to what belongs to it, or how its similarities
agree with scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...tasks.data import DataReport, Row
from ...training.trainers.contrastive import columns_of, value_of
from .. import (
    EVALUATIONS,
    AnsweredRows,
    EvaluatedModel,
    Evaluation,
    Judgement,
    RowParts,
    RowReader,
    pearson,
    ratio,
    read_files,
    read_rows,
    spearman,
    text_in,
)

_NEAREST = (1, 5, 10)


def _read(rows: Any, report: DataReport) -> RowReader:
    columns = columns_of(rows, report)

    def read(model: EvaluatedModel, row: Row, place: object) -> RowParts:
        values = [value_of(row, column, place) for column in columns]
        asked = tuple({"text": text} for text in values if isinstance(text, str))
        return asked, "\n".join(map(str, values[:2])), values[-1 if columns[-1] == "score" else 1]

    return read_rows(rows, report, read)


_read_captions = read_files("image", ("text", "caption"), text_in)


def _read_images(rows: Any, report: DataReport) -> RowReader:
    read = _read_captions(rows, report)
    return lambda model: [row._replace(asked=(*row.asked, {"text": row.expected})) for row in read(model)]


def _judge(rows: AnsweredRows) -> Judgement:
    vectors = np.array([[result["embedding"] for result in reply.results] for reply in rows.replies])
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    near = (vectors[:, 0] * vectors[:, 1]).sum(-1)
    figures = {"similarity": near}
    if isinstance(rows.expected[0], float):
        scores = np.array(rows.expected)
        measures = [spearman(near, scores), pearson(near, scores)]
        return Judgement(measures, figures, np.abs(near - scores), near.tolist())
    ranks = _ranks([[*map(str, row.asked)] for row in rows.rows], vectors)
    measures = [ratio(f"recall@{most}", ranks <= most) for most in _NEAREST]
    measures.append(ratio("mrr", 1 / ranks))
    if vectors.shape[1] > 2:
        measures.append(ratio("triplet_accuracy", near > (vectors[:, 0] * vectors[:, 2]).sum(-1)))
    return Judgement(measures, {"rank": ranks, **figures}, ranks, [f"rank {int(one)}" for one in ranks])


def _ranks(keys: Sequence[Sequence[str]], vectors: np.ndarray) -> np.ndarray:
    """Returns how near the second vector of each row is to its first, among the distinct others of all rows;
    what else belongs to the same first one does not compete. ``keys`` tell which are the same.
    """
    places = {key: (at, part) for at, row in enumerate(keys) for part, key in enumerate(row) if part}
    others = np.array([vectors[place] for place in places.values()])
    number = [*places].index
    own: dict[str, list[int]] = {}
    for first, second, *_ in keys:
        own.setdefault(first, []).append(number(second))
    ranks = np.ones(len(keys))
    for at, (first, second, *_) in enumerate(keys):
        near = others @ vectors[at, 0]
        ranks[at] += np.delete(near > near[number(second)], own[first]).sum()
    return ranks


for _name, _task, _reader in (
    ("embeddings", "feature-extraction", _read),
    ("images-and-texts", "zero-shot-image-classification", _read_images),
):
    EVALUATIONS.register(
        Evaluation(
            _name,
            (_task,),
            _reader,
            _judge,
            reduce=lambda model, row, result: {"embedding": np.array(result["embedding"], np.float32)},
        )
    )
