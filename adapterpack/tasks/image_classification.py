"""Image classification: the label of each image."""

from __future__ import annotations

from typing import Any

from .one_pass import NoOptions, OnePass, Prepared
from .rows import Row, file_of
from .session import Arrays, Head, Session
from .task import MAIN, TASKS, Part, Task


def prepare(session: Session, row: Row, options: NoOptions) -> Prepared:
    """An image."""
    return Prepared({"pixel_values": session.pixels([file_of(row, "image")])})


def result(session: Session, row: Prepared, outputs: Arrays, head: Head, options: NoOptions) -> dict[str, Any]:
    """``label`` and ``scores``."""
    return head.scored(outputs["logits"][0])


TASKS.register(Task(
    "image-classification", "AutoModelForImageClassification", OnePass(prepare, result), ("ForImageClassification",),
    parts=(Part(MAIN, "plain", ("pixel_values",)),), heads=("classifier",), labelled=True,
))
