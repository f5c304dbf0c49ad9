"""Image classification: the label of each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .rows import Row, file_of, map_rows
from .scores import label_answers
from .session import Session
from .task import MAIN, TASKS, Part, Task


def answer(session: Session, rows: Sequence[Row], adapters: Sequence[str | None], sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``label`` and ``scores``."""
    return label_answers(session, {"pixel_values": session.pixels(map_rows(rows, lambda row: file_of(row, "image")))}, adapters)


TASKS.register(Task(
    "image-classification", "AutoModelForImageClassification", answer, ("ForImageClassification",),
    parts=(Part(MAIN, "plain", ("pixel_values",)),), heads=("classifier",), labelled=True,
))
