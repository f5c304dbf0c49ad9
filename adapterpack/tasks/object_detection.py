"""Object detection: what is where in each image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..errors import ConfigError, excerpt
from .data import Encoded, Labels, Result, Row, file_of, no_head, report_of
from .one_pass import OnePass, PreparedRow
from .session import Arrays, RowHead, RowInputs
from .task import ANY_SIZE, MAIN, TASKS, Part, Task, TaskTraining

_MOST = 100
"""The most objects of an image, if the model has no more queries."""
_ABSENT = -1e8
"""Logits of labels that a row's adapter does not have are -1e9."""


@dataclass(frozen=True)
class DetectionOptions:
    """Objects are given whose score is above ``threshold``.

    Raises:
        ConfigError: a value is invalid.
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        if type(self.threshold) not in {int, float} or not 0 <= self.threshold <= 1:
            raise ConfigError(
                "the threshold is out of range",
                where="threshold",
                expected="a number from 0 to 1",
                found=excerpt(self.threshold),
            )


def prepare(session: RowInputs, row: Row, options: Any) -> PreparedRow:
    """Prepares an image, and notes its own height and width."""
    pixels, size = session.sized_pixels(file_of(row, "image"))
    return PreparedRow({"pixel_values": pixels}, size)


def result(
    session: RowInputs, row: PreparedRow, outputs: Arrays, head: RowHead, options: DetectionOptions
) -> Result:
    """Returns ``objects``, the most certain first: ``label``, ``score`` and ``box`` in pixels of the picture
    as it was given.

    A head with one number more than labels gives probabilities, of which the last is that of no object
    (DETR); one with as many gives each label for itself, so that one box can have several (Deformable DETR,
    RT-DETR).
    """
    if head.labels is None:
        return no_head("objects")
    logits = outputs["logits"][0].astype(np.float64)
    boxes = outputs["pred_boxes"][0]
    count = len(head.labels)
    own = int((logits[0] > _ABSENT).sum())
    if own > count:
        weights = np.exp(logits[:, :own] - logits[:, :own].max(-1, keepdims=True))
        chances = (weights / weights.sum(-1, keepdims=True))[:, :count]
        chances = np.where(chances == chances.max(-1, keepdims=True), chances, 0)
    else:
        chances = 1 / (1 + np.exp(-logits[:, :count]))
    best = np.argsort(-chances, axis=None, kind="stable")[: max(_MOST, len(logits))]
    places, names = np.unravel_index(best, chances.shape)
    height, width = row.notes
    found = []
    for place, name in zip(places, names, strict=True):
        if not chances[place, name] > options.threshold:
            break
        x, y, wide, tall = (float(value) for value in boxes[place])
        corners = (
            (x - wide / 2) * width,
            (y - tall / 2) * height,
            (x + wide / 2) * width,
            (y + tall / 2) * height,
        )
        found.append(
            {
                "label": head.labels[name],
                "score": round(float(chances[place, name]), 6),
                "box": dict(
                    zip(("xmin", "ymin", "xmax", "ymax"), (round(one, 3) for one in corners), strict=True)
                ),
            }
        )
    return {"objects": found}


def categories(objects: Any) -> list[Any]:
    """Returns the labels of the objects of a row."""
    found = objects.get("category") if isinstance(objects, dict) else None
    return found if isinstance(found, list) else []


def encode(rows: Any, media: Any, max_length: int, where: object, labels: Labels) -> list[Encoded]:
    """Returns the pixels of each image and the boxes in it, computed when a batch needs them. The columns are
    ``image``, the path of a picture, and ``objects``: ``bbox``, lists of ``[x, y, width, height]`` in its
    pixels, and ``category``, a label for each.

    Raises:
        ConfigError: other columns, a box that lies outside of its picture, or a label that is not among
            ``labels``.
    """
    report = report_of(where)
    report.read_pair(rows.column_names, "image", ("objects",), "object detection needs")

    def encode_row(row: Row, place: object) -> Encoded:
        names, boxes = read_objects(row, place)
        targets = [labels.target(name, place) for name in names]
        return {"image": partial(_targets, media, row["image"], boxes, targets, place)}

    return report.encode(rows, encode_row)


def read_objects(row: Row, place: object) -> tuple[list[Any], list[list[float]]]:
    """Returns the labels and the boxes of the objects of a row.

    Raises:
        ConfigError: they are not as many, or a box is none.
    """
    names = categories(row["objects"])
    boxes = (row["objects"] or {}).get("bbox") or []
    if len(names) != len(boxes) or not all(
        isinstance(box, list) and len(box) == 4 and box[2] > 0 and box[3] > 0 for box in boxes
    ):
        raise ConfigError(
            "objects need as many boxes as categories, and each box four numbers",
            where=place,
            expected="bbox: [[x, y, width, height], ...], category: [label, ...]",
            found=excerpt(row["objects"]),
        )
    return names, boxes


def _targets(media: Any, image: Any, boxes: list[Any], targets: list[int], place: object) -> Encoded:
    """Returns the inputs of a picture, and its boxes as shares of it: center, width and height."""
    pixels, (height, width) = media.sized_pixels(image, place)
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    corners[:, :2] += corners[:, 2:] / 2
    if (corners[:, :2] > (width, height)).any() or (corners[:, :2] < 0).any():
        raise ConfigError(
            "a box lies outside of its picture", where=place, expected=f"{width} x {height} pixels"
        )
    shares = corners / np.array([width, height, width, height], np.float32)
    mask = {"pixel_mask": np.ones(pixels.shape[1:], np.int64)} if media.masks_pixels else {}
    labels = {"class_labels": np.array(targets, np.int64), "boxes": shares}
    return {"pixel_values": pixels, **mask, "labels": labels}


TASKS.register(
    Task(
        "object-detection",
        "AutoModelForObjectDetection",
        OnePass(prepare, result, DetectionOptions),
        ("ForObjectDetection",),
        parts=(Part(MAIN, "plain", ("pixel_values",), ANY_SIZE),),
        heads=("class_labels_classifier",),
        labelled=True,
        training=TaskTraining(
            encode, label_columns=("objects",), reads="media", parts=categories, judged=False
        ),
    )
)
