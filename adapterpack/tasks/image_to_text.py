"""Texts from images with a vision encoder and a text decoder: captions, and recognition of text in a
picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .data import Result, Row, file_of, map_rows
from .session import TaskSession
from .task import MAIN, TASKS, Part, Task
from .text_generation import completions


def answer(
    session: TaskSession, rows: Sequence[Row], adapters: Sequence[str | None], sampling: Mapping[str, Any]
) -> list[Result]:
    """Returns ``completion`` for each row: the text for the image."""
    pixels = session.pixels(map_rows(rows, lambda row: file_of(row, "image")))
    return completions(session, [], adapters, sampling, {"pixel_values": pixels})


TASKS.register(
    Task(
        "image-to-text",
        "AutoModelForImageTextToText",
        answer,
        ("VisionEncoderDecoderModel",),
        lambda config: config.get("model_type") == "vision-encoder-decoder",
        parts=(
            Part("encoder", "encoder", ("pixel_values",)),
            Part(MAIN, "cross_decoder", ("decoder_input_ids", "past_key_values", "encoder")),
        ),
    )
)
