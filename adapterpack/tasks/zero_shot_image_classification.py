"""Two towers: embeddings of texts and of images, whose cosine says how well they go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .rows import PROMPTS, Row, RowError, among, file_of, map_rows, text_of
from .scores import embedding
from .session import Session
from .task import MAIN, TASKS, TEXT, Part, Task


def answer(session: Session, rows: Sequence[Row], adapters: Sequence[str | None], sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``embedding``, of a text or of an image."""
    for number, row in enumerate(rows, 1):
        if "image" in row and any(column in row for column in PROMPTS):
            raise RowError("a row of two towers is a text or an image", row=number, found=", ".join(map(str, row)),
                           remedy="give each a row of its own")
    results: list[dict[str, Any]] = [{}] * len(rows)
    for is_image in (True, False):
        numbers = [number for number, row in enumerate(rows, 1) if ("image" in row) == is_image]
        if numbers:
            with among(numbers):
                vectors = _embeddings(session, [rows[number - 1] for number in numbers], [adapters[number - 1] for number in numbers],
                                      is_image)
            for number, vector in zip(numbers, vectors, strict=True):
                results[number - 1] = embedding(vector)
    return results


def _embeddings(session: Session, rows: Sequence[Row], adapters: Sequence[str | None], images: bool) -> Any:
    if images:
        return session.run({"pixel_values": session.pixels(map_rows(rows, lambda row: file_of(row, "image")))}, adapters)["image_embeds"]
    return session.run(session.encode(map_rows(rows, text_of)), adapters)["text_embeds"]


TASKS.register(Task(
    "zero-shot-image-classification", "AutoModelForZeroShotImageClassification", answer, ("Model",),
    lambda config: bool(config.get("logit_scale_init_value")),
    parts=(Part("text", "text_tower", TEXT), Part(MAIN, "image_tower", ("pixel_values",))),
))
