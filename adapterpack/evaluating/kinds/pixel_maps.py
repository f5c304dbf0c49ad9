"""Measures the label of each pixel, and how far it is."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...tasks.data.rows import Row
from ...tasks.pixel_maps import nearest
from ...tasks.semantic_segmentation import names_of
from ...training.loop.media import Media, content_of
from ..evaluation import (
    EVALUATIONS,
    AnsweredRows,
    EvaluatedModel,
    Evaluation,
    Judgement,
    read_files,
    target_of,
)
from ..measures import of_sums, ratio

_CLOSE = 1.25
"""Depths within this factor of each other are close (Eigen et al. 2014, https://arxiv.org/abs/1406.2283)."""


def _right(model: EvaluatedModel, row: Row, column: str, place: object) -> tuple[Any, ...]:
    file = content_of(row[column], place, f"a {column}", "the path of a file")
    labels = model.labels and [target_of(model, name, place) for name in names_of(row["labels"])]
    return str(file)[:200], (file, labels)


def _judge_segments(rows: AnsweredRows) -> Judgement:
    session, labels = rows.model.session, rows.model.labels
    assert labels is not None
    media, count = Media(session.folder, session.task), len(labels.names)
    sums = np.zeros((3, len(rows.rows), count))
    for at, (row, result) in enumerate(zip(rows.rows, rows.results, strict=True)):
        answer = result["segmentation"]
        given = np.full((answer["size"][1], answer["size"][0]), count)
        for segment in answer["segments"]:
            runs = segment["counts"]
            given.reshape(-1)[np.repeat(np.arange(len(runs)) % 2 == 1, runs)] = segment["id"]
        file, targets = row.known
        mask = nearest(media.mask(file, row.place), given.T.shape)
        named = mask < len(targets)
        wanted, found = np.array(targets)[mask[named]], given.T[named]
        one, two, both = (
            np.bincount(values, minlength=count + 1)[:count]
            for values in (wanted, found, wanted[wanted == found])
        )
        sums[:, at] = both, one + two - both, one
    own = np.array([*map(mean_iou, sums[0], sums[1])])
    right, pixels = sums[0].sum(1), sums[2].sum(1)
    measures = [of_sums("miou", sums[:2], mean_iou), ratio("accuracy", right, pixels)]
    return Judgement(measures, {"iou": own}, -own, [f"IoU {one:.3f}" for one in own])


def mean_iou(both: np.ndarray, either: np.ndarray) -> float:
    """Returns the mean, over the labels that there are, of the pixels in common over all of theirs."""
    return float((both / np.maximum(either, 1)).sum() / max((either > 0).sum(), 1))


def _judge_depths(rows: AnsweredRows) -> Judgement:
    session = rows.model.session
    media, sums = Media(session.folder, session.task), []
    for row, result in zip(rows.rows, rows.results, strict=True):
        given = np.array(result["depth"]["values"])
        wanted = nearest(media.map(row.known[0]), given.shape)
        given, wanted = given[wanted > 0], wanted[wanted > 0]
        factor = np.maximum(given / wanted, wanted / np.maximum(given, np.finfo(float).tiny))
        sums.append((np.abs(given / wanted - 1).sum(), (factor < _CLOSE).sum(), len(wanted)))
    errors, close, pixels = np.array(sums, float).T
    return Judgement(
        [
            ratio("absolute_relative_error", errors, pixels, more_is_better=False),
            ratio("delta1", close, pixels),
        ],
        {"absolute_relative_error": errors / pixels},
        errors / pixels,
        [f"error {one:.3f}" for one in errors / pixels],
    )


EVALUATIONS.register(
    Evaluation(
        "segments",
        ("semantic-segmentation",),
        read_files("image", ("mask",), _right),
        _judge_segments,
        options=lambda session, rows: {"format": "rle"},
    )
)
EVALUATIONS.register(
    Evaluation(
        "depths",
        ("depth-estimation",),
        read_files("image", ("depth_map",), _right),
        _judge_depths,
        options=lambda session, rows: {"format": "values"},
    )
)
