"""Image classification: the label of each image."""

from __future__ import annotations

from functools import partial
from typing import Any

from .data import Encoded, Labels, Row, file_of, report_of
from .one_pass import NoOptions, OnePass, PreparedRow
from .session import RowInputs
from .task import MAIN, TASKS, Part, Task, TaskTraining
from .text_classification import result


def prepare(session: RowInputs, row: Row, options: NoOptions) -> PreparedRow:
    """Prepares an image."""
    return PreparedRow({"pixel_values": session.pixels([file_of(row, "image")])})


def encode(rows: Any, media: Any, max_length: int, where: object, labels: Labels) -> list[Encoded]:
    """Returns the pixels of each image, computed when a batch needs them, and the training target of its
    label. The columns are ``image``, the path of a picture, and ``label`` or ``labels``.

    Raises:
        ConfigError: other columns, or a label that is not among ``labels``.
    """
    return report_of(where).encode_labelled(
        rows,
        labels,
        "image",
        "image classification needs",
        lambda row, place: {"pixel_values": partial(media.pixels, row["image"], place)},
    )


TASKS.register(
    Task(
        "image-classification",
        "AutoModelForImageClassification",
        OnePass(prepare, result),
        ("ForImageClassification",),
        parts=(Part(MAIN, "plain", ("pixel_values",)),),
        heads=("classifier",),
        labelled=True,
        training=TaskTraining(encode, reads="media"),
    )
)
