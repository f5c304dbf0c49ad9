"""Text generation with images: the continuation of a prompt that may include an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..errors import ConfigError
from .conversations.encoding import by_row
from .data.problems import IGNORED, Labels
from .data.rows import Picture, Row, file_of, map_rows, prompt_of
from .session import TaskSession
from .task import DECODER, GRID, MAIN, TASKS, Part, Task, TaskTraining
from .text_generation import completions


def answer(
    session: TaskSession, rows: Sequence[Row], adapters: Sequence[str | None], sampling: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Returns ``completion`` for each row, as for text generation. A row has one ``image`` or a list of them,
    or images in the content of its messages.
    """
    read = map_rows(rows, lambda row: session.see(prompt_of(row), _pictures(row)))
    images = session.images([picture for _, pictures in read for picture in pictures])
    return completions(session, [ids for ids, _ in read], adapters, sampling, images)


def _pictures(row: Row) -> list[Any]:
    given = row.get("image", [])
    return [file_of({"image": one}, "image") for one in (given if isinstance(given, list) else [given])]


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


_PARTS = "adapterpack.exporting.tracing.vision_parts"
TASKS.register(
    Task(
        "image-text-to-text",
        "AutoModelForImageTextToText",
        answer,
        ("ForConditionalGeneration",),
        lambda config: bool(config.get("vision_config")) and not config.get("is_encoder_decoder"),
        columns={"image": Picture | list},
        parts=(
            Part("vision", f"{_PARTS}:Vision", ("pixel_values", *GRID)),
            Part(
                MAIN,
                f"{_PARTS}:SeeingDecoder",
                (*DECODER, "image_features", "position_offsets", "token_type_ids"),
            ),
        ),
        training=TaskTraining(encode, reads="media", adapted="all-language"),
    )
)
