"""The texts on which changes of a bundle's graphs are measured, as tokens."""

from __future__ import annotations

from pathlib import Path

from ...base.base_folder import read_json
from ...errors import AdapterpackError
from ...pack import canary
from ..text.context_length import text_part
from .session import Session


def texts(session: Session) -> list[tuple[int, ...]]:
    """The canary's rows of tokens, beginning as the model's texts do."""
    rows = [*canary.inputs(vocabulary(session.folder))]
    if isinstance(begin := read_json(session.folder / "config.json").get("bos_token_id"), int):
        # activations behind another first token can be unlike those of any text
        rows = [(begin, *row[1:]) for row in rows]
    if "image_features" not in session.task.main.inputs:
        return rows
    token = session.image_token
    return [
        ((token,) * session.image_positions) + tuple(token_id for token_id in row if token_id != token)
        for row in rows
    ]


def vocabulary(folder: Path) -> int:
    """How many tokens the model of a bundle's folder has.

    Raises:
        AdapterpackError: its config does not say.
    """
    size = text_part(read_json(folder / "config.json"), "vocab_size").get("vocab_size")
    if not isinstance(size, int):
        raise AdapterpackError(
            "the bundle's config has no vocabulary size, so the error cannot be measured", where=folder.name
        )
    return size
