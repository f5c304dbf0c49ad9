"""Returns the token rows on which the error of changed graphs (quantization, for example) is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...base import read_json
from ...errors import AdapterpackError
from ...pack import canary
from ..text import text_part
from .session import Session


def texts(session: Session, images: Sequence[int] = ()) -> list[tuple[int, ...]]:
    """Returns the canary's token rows, with the model's first token in front, after an image of so many
    tokens in each row.
    """
    rows = [*canary.inputs(vocabulary(session.folder))]
    if isinstance(begin := read_json(session.folder / "config.json").get("bos_token_id"), int):
        # after an unusual first token, activations can differ from those of any real text
        rows = [(begin, *row[1:]) for row in rows]
    if "image_features" not in session.task.main.inputs:
        return rows
    token = session.image_token
    return [
        ((token,) * length) + tuple(token_id for token_id in row if token_id != token)
        for row, length in zip(rows, images or [0] * len(rows), strict=True)
    ]


def vocabulary(folder: Path) -> int:
    """Returns the vocabulary size of the model in a bundle's folder.

    Raises:
        AdapterpackError: the config has no vocabulary size.
    """
    size = text_part(read_json(folder / "config.json"), "vocab_size").get("vocab_size")
    if not isinstance(size, int):
        raise AdapterpackError(
            "the bundle's config has no vocabulary size, so the error cannot be measured", where=folder.name
        )
    return size
