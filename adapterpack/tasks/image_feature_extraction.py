"""Image feature extraction: an embedding of each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .feature_extraction import embedded
from .rows import Row, file_of, map_rows
from .session import Session
from .task import MAIN, TASKS, Part, Task


def answer(session: Session, rows: Sequence[Row], adapters: Sequence[str | None], sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``embedding``."""
    return embedded(session, {"pixel_values": session.pixels(map_rows(rows, lambda row: file_of(row, "image")))}, adapters)


def _recognizes(config: Mapping[str, Any]) -> bool:
    return bool(config.get("image_size") or config.get("patch_size")) and not config.get("logit_scale_init_value")


TASKS.register(Task(
    "image-feature-extraction", "AutoModel", answer, ("Model",), _recognizes, parts=(Part(MAIN, "plain", ("pixel_values",)),),
))
