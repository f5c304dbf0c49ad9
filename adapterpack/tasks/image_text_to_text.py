"""Text generation with images: the continuation of a prompt that may have one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..errors import ConfigError
from .rows import Row, among, file_of, map_rows, prompt_of
from .session import Session
from .task import DECODER, MAIN, TASKS, Part, Task
from .text_generation import completions


def answer(session: Session, rows: Sequence[Row], adapters: Sequence[str | None], sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``completion``, as of text generation."""
    numbers, images = [number for number, row in enumerate(rows, 1) if "image" in row], None
    if numbers:
        with among(numbers):
            images = {"pixel_values": session.pixels(map_rows([rows[number - 1] for number in numbers], lambda row: file_of(row, "image")))}
    return completions(session, map_rows(rows, partial(_ids, session)), adapters, sampling, images)


def _ids(session: Session, row: Row) -> list[int]:
    """The ids of a prompt, with as many image tokens as its image has positions: in the place of its one, or before everything."""
    prompt, token = prompt_of(row), session.image_token
    ids: list[int] = session.tokenizer.encode(prompt) if isinstance(prompt, str) else session.tokenizer.prompt(prompt)
    if "image" not in row:
        if token in ids:
            raise ConfigError("a prompt has image tokens, but its row has no image", found=f"{ids.count(token)} image tokens",
                              remedy="give the row an image")
        return ids
    if ids.count(token) > 1:
        raise ConfigError("a prompt has one token for its image", found=f"{ids.count(token)} image tokens", expected="1, or none",
                          remedy="leave the others out: one stands for all positions of the image")
    at = ids.index(token) if token in ids else 0
    return [*ids[:at], *[token] * session.image_positions, *ids[at + (token in ids) :]]


TASKS.register(Task(
    "image-text-to-text", "AutoModelForImageTextToText", answer, ("ForConditionalGeneration",),
    lambda config: bool(config.get("vision_config")) and not config.get("is_encoder_decoder"),
    parts=(Part("vision", "vision", ("pixel_values",)), Part(MAIN, "seeing_decoder", (*DECODER, "image_features"))),
))
