"""Two towers: embeddings of texts and of images, whose cosine says how well they go together."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from .embeddings import EmbeddingOptions, embedding, width_of
from .one_pass import OnePass, Prepared, text_inputs
from .rows import PROMPTS, Row, file_of
from .session import Arrays, Head, Session
from .task import MAIN, TASKS, TEXT, Part, Task


def prepare(session: Session, row: Row, options: EmbeddingOptions) -> Prepared:
    """A text or an image."""
    if "image" in row and any(column in row for column in PROMPTS):
        raise ConfigError("a row of two towers is a text or an image", found=", ".join(map(str, row)), remedy="give each a row of its own")
    options.require_fit(width_of(session))
    if "image" in row:
        return Prepared({"pixel_values": session.pixels([file_of(row, "image")])}, "image_embeds")
    return Prepared(text_inputs(session, row), "text_embeds")


def result(session: Session, row: Prepared, outputs: Arrays, head: Head, options: EmbeddingOptions) -> dict[str, Any]:
    """``embedding``, of a text or of an image."""
    return embedding(outputs[row.notes][0], options)


TASKS.register(Task(
    "zero-shot-image-classification", "AutoModelForZeroShotImageClassification", OnePass(prepare, result, EmbeddingOptions), ("Model",),
    lambda config: bool(config.get("logit_scale_init_value")),
    parts=(Part("text", "text_tower", TEXT), Part(MAIN, "image_tower", ("pixel_values",))),
))
