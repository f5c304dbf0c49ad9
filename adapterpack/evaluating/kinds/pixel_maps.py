"""Measures the label of each pixel, and how far it is."""

from __future__ import annotations

import numpy as np

from ...tasks.data import Row
from ...tasks.pixel_maps import nearest
from ...tasks.semantic_segmentation import names_of
from ...training.loop.media import content_of
from .. import (
    EVALUATIONS,
    AnsweredRows,
    EvaluatedModel,
    Evaluation,
    EvaluationRow,
    Judgement,
    Result,
    RowParts,
    of_sums,
    ratio,
    read_files,
    target_of,
)

_CLOSE = 1.25
"""Depths within this factor of each other are close (Eigen et al. 2014, https://arxiv.org/abs/1406.2283)."""


def _right(model: EvaluatedModel, row: Row, column: str, place: object) -> RowParts:
    file = content_of(row[column], place, f"a {column}", "the path of a file")
    labels = model.labels and [target_of(model, name, place) for name in names_of(row["labels"])]
    return str(file)[:200], (file, labels)


def _count_pixels(model: EvaluatedModel, row: EvaluationRow, result: Result) -> Result:
    """Returns how many pixels of each label are right, given or wanted, and wanted."""
    assert model.labels is not None
    answer = result["segmentation"]
    count = len(model.labels.names)
    given = np.full((answer["size"][1], answer["size"][0]), count)
    for segment in answer["segments"]:
        runs = segment["counts"]
        given.reshape(-1)[np.repeat(np.arange(len(runs)) % 2 == 1, runs)] = segment["id"]
    file, targets = row.known
    mask = nearest(model.media.mask(file, row.place), given.T.shape)
    named = mask < len(targets)
    wanted = np.array(targets)[mask[named]]
    found = given.T[named]
    one, two, both = (
        np.bincount(values, minlength=count + 1)[:count]
        for values in (wanted, found, wanted[wanted == found])
    )
    return {"pixels": (both, one + two - both, one)}


def _judge_segments(rows: AnsweredRows) -> Judgement:
    both, either, wanted = np.array([result["pixels"] for result in rows.results], float).swapaxes(0, 1)
    own = np.array([*map(mean_iou, both, either)])
    measures = [of_sums("miou", (both, either), mean_iou), ratio("accuracy", both.sum(1), wanted.sum(1))]
    return Judgement(measures, {"iou": own}, -own, [f"IoU {one:.3f}" for one in own])


def mean_iou(both: np.ndarray, either: np.ndarray) -> float:
    """Returns the mean, over the labels that there are, of the pixels in common over all of theirs."""
    return float((both / np.maximum(either, 1)).sum() / max((either > 0).sum(), 1))


def _measure_depths(model: EvaluatedModel, row: EvaluationRow, result: Result) -> Result:
    """Returns the sum of the relative errors of pixels, how many are close, and how many there are."""
    given = np.array(result["depth"]["values"])
    wanted = nearest(model.media.map(row.known[0]), given.shape)
    given, wanted = given[wanted > 0], wanted[wanted > 0]
    factor = np.maximum(given / wanted, wanted / np.maximum(given, np.finfo(float).tiny))
    return {"pixels": (np.abs(given / wanted - 1).sum(), (factor < _CLOSE).sum(), len(wanted))}


def _judge_depths(rows: AnsweredRows) -> Judgement:
    errors, close, pixels = np.array([result["pixels"] for result in rows.results], float).T
    own = errors / np.maximum(pixels, 1)
    measures = [ratio("absolute_relative_error", errors, pixels, False), ratio("delta1", close, pixels)]
    return Judgement(measures, {"error": own}, own, [f"error {one:.3f}" for one in own])


EVALUATIONS.register(
    Evaluation(
        "segments",
        ("semantic-segmentation",),
        read_files("image", ("mask",), _right),
        _judge_segments,
        options=lambda session, rows: {"format": "rle"},
        reduce=_count_pixels,
    )
)
EVALUATIONS.register(
    Evaluation(
        "depths",
        ("depth-estimation",),
        read_files("image", ("depth_map",), _right),
        _judge_depths,
        options=lambda session, rows: {"format": "values"},
        reduce=_measure_depths,
    )
)
