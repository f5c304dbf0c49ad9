"""Image feature extraction: an embedding of each image."""

from __future__ import annotations

from .data import Result, Row, file_of
from .embeddings import EmbeddingOptions, pool, width_of
from .one_pass import OnePass, PreparedRow
from .session import Arrays, RowHead, RowInputs
from .task import MAIN, TASKS, Part, Task


def prepare(session: RowInputs, row: Row, options: EmbeddingOptions) -> PreparedRow:
    """Prepares an image."""
    options.require_fit(width_of(session))
    return PreparedRow({"pixel_values": session.pixels([file_of(row, "image")])})


def result(
    session: RowInputs, row: PreparedRow, outputs: Arrays, head: RowHead, options: EmbeddingOptions
) -> Result:
    """Returns ``embedding``: the hidden states of the image, pooled by the bundle's method."""
    return pool(session, next(iter(outputs.values())), None, options)


TASKS.register(
    Task(
        "image-feature-extraction",
        "AutoModel",
        OnePass(prepare, result, EmbeddingOptions),
        ("Model",),
        lambda config: (
            bool(config.get("image_size") or config.get("patch_size"))
            and not config.get("logit_scale_init_value")
        ),
        parts=(Part(MAIN, "plain", ("pixel_values",)),),
    )
)
