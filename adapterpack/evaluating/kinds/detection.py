"""Measures the objects that are found in images, as COCO does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ...tasks.data import Row
from ...tasks.object_detection import read_objects
from .. import (
    EVALUATIONS,
    AnsweredRows,
    EvaluatedModel,
    Evaluation,
    Judgement,
    Result,
    RowParts,
    read_files,
    target_of,
)
from ..measures import of_rows

_OVERLAPS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0, 1, 101)
_SHOWN = 0.5
"""The score from which people read an object."""
_MOST = 100
"""The most objects of a label in an image."""

Matches = tuple[np.ndarray, np.ndarray, int]
"""Scores ``[found]``, at which overlaps each is right ``[found, overlaps]``, and how many there are."""


def _right(model: EvaluatedModel, row: Row, column: str, place: object) -> RowParts:
    names, boxes = read_objects(row, place)
    for name in names:
        target_of(model, name, place)
    return ", ".join(map(str, names)), (names, boxes)


def _judge(rows: AnsweredRows) -> Judgement:
    found = [result["objects"] for result in rows.results]
    images = [matches(row.known, objects) for row, objects in zip(rows.rows, found, strict=True)]
    measures = [
        of_rows(name, partial(average_precision, images, cut), draws=100)
        for name, cut in (("map", slice(None)), ("map_50", slice(1)))
    ]
    own = np.array([average_precision(images, slice(1), [at]) for at in range(len(images))])
    own = np.nan_to_num(own, nan=1.0)  # where there is nothing, nothing is missed
    answers = [
        ", ".join(f"{one['label']} {one['score']:.2f}" for one in some if one["score"] >= _SHOWN)
        for some in found
    ]
    return Judgement(measures, {"ap_50": own}, -own, answers)


def matches(
    known: tuple[Sequence[Any], Sequence[Sequence[float]]], objects: Sequence[Result]
) -> dict[str, Matches]:
    """Returns label -> which of the ``objects`` found in an image are right: each, from the surest on, takes
    the box that it overlaps most of those that none has taken (https://cocodataset.org/#detection-eval).
    """
    matched = {}
    for name in {*map(str, known[0])} | {one["label"] for one in objects}:
        own = sorted((one for one in objects if one["label"] == name), key=lambda one: -one["score"])[:_MOST]
        right = np.array([box for label, box in zip(*known, strict=True) if str(label) == name], float)
        right = right.reshape(-1, 4)
        right[:, 2:] += right[:, :2]
        given = np.array([[*one["box"].values()] for one in own], float).reshape(-1, 4)
        shared = overlaps_of(given, right)
        taken = np.zeros((len(_OVERLAPS), len(right)), bool)
        ok = np.zeros((len(own), len(_OVERLAPS)), bool)
        for at, row in enumerate(shared if len(right) else ()):
            free = np.where(taken, -1.0, row)
            best = free.argmax(1)
            ok[at] = free.max(1) >= _OVERLAPS
            taken[ok[at], best[ok[at]]] = True
        matched[name] = np.array([one["score"] for one in own]), ok, len(right)
    return matched


def overlaps_of(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Returns the shared area of each pair of boxes ``[n, 4]`` and ``[m, 4]`` over the area of both."""
    corners = np.minimum(one[:, None, 2:], two[:, 2:]) - np.maximum(one[:, None, :2], two[:, :2])
    shared = corners.clip(0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (one, two)]
    overlaps: np.ndarray = shared / (areas[0][:, None] + areas[1] - shared)
    return overlaps


def average_precision(
    images: Sequence[Mapping[str, Matches]], overlaps: slice, rows: Sequence[int] | np.ndarray
) -> float:
    """Returns the mean over labels and overlaps of the precision at 101 recalls, of the images in these
    ``rows``.
    """
    precisions = []
    for name in {name for image in images for name in image}:
        own = [images[row][name] for row in rows if name in images[row]]
        if not (count := sum(one[2] for one in own)):
            continue
        scores, ok = (np.concatenate([one[part] for one in own]) for part in (0, 1))
        hits = ok[np.argsort(-scores, kind="stable"), overlaps].cumsum(0)
        precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1)[:, None])[::-1])[::-1]
        for hit, best in zip(hits.T, precision.T, strict=True):
            precisions.append(np.append(best, 0.0)[np.searchsorted(hit / count, _RECALLS)].mean())
    return float(np.mean(precisions)) if precisions else np.nan


EVALUATIONS.register(
    Evaluation(
        "objects",
        ("object-detection",),
        read_files("image", ("objects",), _right),
        _judge,
        options=lambda session, rows: {"threshold": 0.0},
    )
)
