"""Text generation with images: the continuation of a prompt that may include an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..errors import ConfigError
from .conversations.encoding import by_row
from .data.problems import IGNORED, Labels
from .data.rows import Row, among, file_of, map_rows, prompt_of
from .session import TaskSession
from .task import DECODER, MAIN, TASKS, Part, Task, TaskTraining
from .text_generation import completions


def answer(
    session: TaskSession, rows: Sequence[Row], adapters: Sequence[str | None], sampling: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Returns ``completion`` for each row, as for text generation."""
    numbers, images = [number for number, row in enumerate(rows, 1) if "image" in row], None
    if numbers:
        with among(numbers):
            images = {
                "pixel_values": session.pixels(
                    map_rows([rows[number - 1] for number in numbers], lambda row: file_of(row, "image"))
                )
            }
    return completions(session, map_rows(rows, partial(_ids, session)), adapters, sampling, images)


def _ids(session: TaskSession, row: Row) -> list[int]:
    """Returns the ids of a prompt with one image token for each position of its image, in place of the
    prompt's single image token or at the beginning.
    """
    prompt, token = prompt_of(row), session.image_token
    ids: list[int] = (
        session.tokenizer.encode(prompt) if isinstance(prompt, str) else session.tokenizer.prompt(prompt)
    )
    if "image" not in row:
        if token in ids:
            raise ConfigError(
                "a prompt has image tokens, but its row has no image",
                found=f"{ids.count(token)} image tokens",
                remedy="give the row an image",
            )
        return ids
    if ids.count(token) > 1:
        raise ConfigError(
            "a prompt has one token for its image",
            found=f"{ids.count(token)} image tokens",
            expected="1, or none",
            remedy="leave the others out: one stands for all positions of the image",
        )
    # The decoder needs one token per position of the image, but a prompt writes only one.
    at = ids.index(token) if token in ids else 0
    return [*ids[:at], *[token] * session.image_positions, *ids[at + (token in ids) :]]


def encode(
    rows: Any, media: Any, max_length: int, where: object, labels: Labels | None = None
) -> list[dict[str, Any]]:
    """Returns token ids and labels as for text generation, and the pixels of each row's image, computed when
    a batch needs them. The single image token of a row is repeated for each position of the image, or
    inserted at the beginning. The rows have the column ``image`` in addition to the columns of a format for
    language models.

    Raises:
        ConfigError: the column of images is missing, or a row has several image tokens; otherwise as for text
            generation.
    """
    if "image" not in rows.column_names:
        raise ConfigError(
            "images with texts need the column image", where=where, found=", ".join(rows.column_names)
        )
    images, token, encoded = rows["image"], media.image_token, []
    for number, parts in by_row(rows.remove_columns("image"), media.tokenizer, max_length, where).items():
        for part in parts[:1]:  # the other parts of a long text have no image
            ids, wanted = part["input_ids"], part["labels"]
            if ids.count(token) > 1:
                raise ConfigError(
                    "a row has one token for its image",
                    where=f"{where}, row {number + 1}",
                    found=f"{ids.count(token)} image tokens",
                )
            at, there = (ids.index(token), 1) if token in ids else (0, 0)
            encoded.append(
                {
                    "input_ids": [*ids[:at], *[token] * media.image_positions, *ids[at + there :]],
                    "labels": [*wanted[:at], *[IGNORED] * media.image_positions, *wanted[at + there :]],
                    "pixel_values": partial(media.pixels, images[number], f"{where}, row {number + 1}"),
                }
            )
    return encoded


TASKS.register(
    Task(
        "image-text-to-text",
        "AutoModelForImageTextToText",
        answer,
        ("ForConditionalGeneration",),
        lambda config: bool(config.get("vision_config")) and not config.get("is_encoder_decoder"),
        parts=(
            Part("vision", "vision", ("pixel_values",)),
            Part(MAIN, "seeing_decoder", (*DECODER, "image_features")),
        ),
        training=TaskTraining(encode, reads="media", adapted="all-language"),
    )
)
