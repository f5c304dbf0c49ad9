"""Semantic segmentation: the label of each pixel of an image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal

import numpy as np

from ..errors import ConfigError, excerpt
from .data import Encoded, Labels, Result, Row, no_head, report_of
from .one_pass import OnePass, PreparedRow
from .pixel_maps import linear, nearest, png, prepare, resize
from .session import Arrays, RowHead, RowInputs
from .task import ANY_SIZE, MAIN, TASKS, Part, Task, TaskTraining


@dataclass(frozen=True)
class SegmentationOptions:
    """``format`` is ``png`` for a picture whose pixels are the numbers of labels, or ``rle`` for the runs of
    each label.

    Raises:
        ConfigError: a value is invalid.
    """

    format: Literal["png", "rle"] = "png"

    def __post_init__(self) -> None:
        if self.format not in ("png", "rle"):
            raise ConfigError(
                "segments have no such form",
                where="format",
                expected="png or rle",
                found=excerpt(self.format),
            )


def result(
    session: RowInputs, row: PreparedRow, outputs: Arrays, head: RowHead, options: SegmentationOptions
) -> Result:
    """Returns ``segmentation``, as large as the picture was: its ``size``, and the ``segments``, the largest
    first, each with its ``label``, ``id`` and number of ``pixels``.

    ``png`` is a picture of 16 bits whose pixels are ids. With ``rle`` each segment has ``counts``, as COCO's
    uncompressed masks have them: the lengths of the runs without and with the label, in turn, column by
    column.
    """
    if head.labels is None:
        return no_head("segmentation")
    likeliest = _likeliest(outputs["logits"][0][: len(head.labels)], row.notes)
    ids, counts = np.unique(likeliest, return_counts=True)
    segments = [
        {"label": head.labels[ids[at]], "id": int(ids[at]), "pixels": int(counts[at])}
        for at in np.argsort(-counts, kind="stable")
    ]
    answer: dict[str, Any] = {"size": [*row.notes], "segments": segments}
    if options.format == "png":
        return {"segmentation": {**answer, "png": png(likeliest)}}
    runs = [segment | {"counts": _runs(likeliest == segment["id"])} for segment in segments]
    return {"segmentation": {**answer, "segments": runs}}


def _likeliest(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns the number of the likeliest label of each pixel. One label is resized at a time, since a large
    picture has room for a few maps.
    """
    best = resize(logits[0], size, linear)
    found = np.zeros(size, np.int64)
    for number, one in enumerate(logits[1:], 1):
        scores = resize(one, size, linear)
        found[higher := scores > best] = number
        best[higher] = scores[higher]
    return found


def _runs(mask: np.ndarray) -> list[int]:
    runs = [(value, sum(1 for _ in run)) for value, run in groupby(mask.T.ravel().tolist())]
    return [*([0] if runs[0][0] else []), *(count for _, count in runs)]


def encode(rows: Any, media: Any, max_length: int, where: object, labels: Labels) -> list[Encoded]:
    """Returns the pixels of each image and the label of each in the same size, read when a batch needs them.
    The columns are ``image``, the path of a picture, ``mask``, the path of a PNG whose pixels are numbers,
    and ``labels``, the names of the numbers from 0 on; 255 is a pixel of which nothing is to be learned.

    Raises:
        ConfigError: other columns, a mask that is no path, or a label that is not among ``labels``.
    """
    report = report_of(where)
    report.read_pair(rows.column_names, "image", ("mask",), "semantic segmentation needs")

    def encode_row(row: Row, place: object) -> Encoded:
        targets = [labels.target(name, place) for name in names_of(row["labels"])]
        return {"image": partial(_targets, media, row, targets, place)}

    return report.encode(rows, encode_row)


def names_of(names: Any) -> list[Any]:
    """Returns the names of the numbers of a row's mask."""
    return names if isinstance(names, list) else []


_UNKNOWN = 255
"""The number of a pixel without a label, as data sets write it and transformers' losses leave it out."""


def _targets(media: Any, row: Row, targets: list[int], place: object) -> Encoded:
    """Returns the inputs of a row."""
    pixels = media.pixels(row["image"], place)
    mask = nearest(media.mask(row["mask"], place), pixels.shape[1:])
    wrong = mask[(mask != _UNKNOWN) & (mask >= len(targets))]
    if wrong.size:
        raise ConfigError(
            "a mask has a number without a name",
            where=place,
            expected=f"0 to {len(targets) - 1}, or {_UNKNOWN}",
            found=int(wrong[0]),
        )
    label_of = np.full(max(_UNKNOWN, len(targets)) + 1, _UNKNOWN)
    label_of[: len(targets)] = targets
    label_of[_UNKNOWN] = _UNKNOWN
    return {"pixel_values": pixels, "labels": label_of[mask]}


TASKS.register(
    Task(
        "semantic-segmentation",
        "AutoModelForSemanticSegmentation",
        OnePass(prepare, result, SegmentationOptions),
        ("ForSemanticSegmentation",),
        parts=(Part(MAIN, "plain", ("pixel_values",), ANY_SIZE),),
        labelled=True,
        training=TaskTraining(encode, label_columns=("labels",), reads="media", parts=names_of, judged=False),
    )
)
