"""Models with two towers: embeddings of texts and of images, whose cosine similarity says how well they
match.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ..errors import ConfigError, excerpt
from .data import PROMPTS, Encoded, Labels, Result, Row, file_of, report_of
from .embeddings import EmbeddingOptions, embedding, width_of
from .one_pass import OnePass, PreparedRow, text_inputs
from .session import Arrays, RowHead, RowInputs
from .task import MAIN, TASKS, TEXT, Part, Task, TaskTraining


def prepare(session: RowInputs, row: Row, options: EmbeddingOptions) -> PreparedRow:
    """Prepares a text or an image."""
    if "image" in row and any(column in row for column in PROMPTS):
        raise ConfigError(
            "a row of two towers is a text or an image",
            found=", ".join(map(str, row)),
            remedy="give each a row of its own",
        )
    options.require_fit(width_of(session))
    if "image" in row:
        return PreparedRow({"pixel_values": session.pixels([file_of(row, "image")])}, "image_embeds")
    return PreparedRow(text_inputs(session, row), "text_embeds")


def result(
    session: RowInputs, row: PreparedRow, outputs: Arrays, head: RowHead, options: EmbeddingOptions
) -> Result:
    """Returns ``embedding``, of a text or of an image."""
    return embedding(outputs[row.notes][0], options)


def encode(
    rows: Any, media: Any, max_length: int, where: object, labels: Labels | None = None
) -> list[Encoded]:
    """Returns the pixels of each image, computed when a batch needs them, and the token ids of its text. The
    columns are ``image`` and ``text`` or ``caption``. Training learns which text of a batch belongs to which
    image (Radford et al. 2021, https://arxiv.org/abs/2103.00020).

    Raises:
        ConfigError: other columns, or a row without a text.
    """
    report = report_of(where)
    column = report.read_pair(rows.column_names, "image", ("text", "caption"), "images and texts need")

    def encode_row(row: Row, place: object) -> Encoded:
        if not isinstance(row[column], str):
            raise ConfigError("a row without text", where=place, found=excerpt(row[column]))
        return {
            "input_ids": report.tokenize(media.tokenizer, max_length, row[column])["input_ids"],
            "pixel_values": partial(media.pixels, row["image"], place),
        }

    return report.encode(rows, encode_row)


TASKS.register(
    Task(
        "zero-shot-image-classification",
        "AutoModelForZeroShotImageClassification",
        OnePass(prepare, result, EmbeddingOptions),
        ("Model",),
        lambda config: bool(config.get("logit_scale_init_value")),
        parts=(Part("text", "text_tower", TEXT), Part(MAIN, "image_tower", ("pixel_values",))),
        training=TaskTraining(encode, (), reads="media", constants={"return_loss": True}),
    )
)
