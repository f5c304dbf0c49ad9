"""Checks that rows fit a model's context, whose length its configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...errors import FormatError
from ...tasks.data.rows import RowError

_KEYS = ("max_target_positions", "max_position_embeddings", "n_positions", "max_seq_len")
"""What families call it; of an encoder and decoder with two numbers that of the decoder counts."""
_SHORTEST, _CHARACTERS, _UNBOUNDED = 1 << 16, 16, 1 << 16
"""The least that the most characters are; the most of one token, on average over a text; the tokens of a
model without a bound.
"""
_AFTER_PADDING = frozenset(
    {
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "longformer",
        "luke",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
"""Families whose tables of positions have rows for the padding and for what is before it: the first token has
the one behind them.
"""


class Configured(Protocol):
    """A folder with its model's ``config.json``."""

    folder: Path

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration."""


def context_length(config: Mapping[str, Any], where: object = None) -> int | None:
    """The most positions of a row, or None where nothing bounds them, as with relative positions.

    Positions that could be computed for longer rows (rotary ones) end where the configuration says that the
    model was made for.

    Raises:
        FormatError: the configuration says what cannot be.

    Example:
        >>> context_length({"max_position_embeddings": 514, "model_type": "roberta", "pad_token_id": 1})
        512
    """
    known = text_part(config, *_KEYS)
    if known.get("relative_attention_num_buckets") or (
        known.get("relative_attention") and not known.get("position_biased_input", True)
    ):
        return None  # distances between tokens, however long the row is
    key = next((key for key in _KEYS if known.get(key) is not None), None)
    if key is None:
        return None
    length = known[key]
    if type(length) is not int or length < 1:
        raise FormatError(
            "this is no number of positions",
            where=f"{where}#{key}" if where else key,
            expected="a number from 1",
            found=repr(length)[:80],
        )
    padding = known.get("pad_token_id")
    return (
        length - padding - 1 if known.get("model_type") in _AFTER_PADDING and type(padding) is int else length
    )


def text_part(config: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The part of a configuration that has one of these keys: itself, or the one of its language model."""
    inner = next(
        (part for name in ("text_config", "decoder") if isinstance(part := config.get(name), Mapping)), None
    )
    return config if inner is None or any(key in config for key in keys) else inner


def context_of(session: Configured) -> int | None:
    """:func:`context_length` of a session's model."""
    return context_length(session.config, session.folder / "config.json")


def most_characters(session: Configured) -> int:
    """The most characters of a text that may fit the model's context: beyond it a row is refused before it is
    made tokens, which takes memory and time many times its length.
    """
    return max(_SHORTEST, _CHARACTERS * (context_of(session) or _UNBOUNDED))


def require_context(session: Configured, lengths: np.ndarray, virtual: np.ndarray | int = 0) -> None:
    """Checks that the model has positions for rows of these ``lengths`` ``[rows]``, of which ``virtual`` are
    those of an adapter's prompt.

    Raises:
        RowError: the first that is too long.
    """
    most = context_of(session)
    if most is None or not len(lengths) or lengths.max() <= most:
        return
    row = int(np.argmax(lengths > most))
    own = int(np.broadcast_to(virtual, lengths.shape)[row])
    raise RowError(
        "a row is longer than the model's context",
        row=row + 1,
        expected=f"at most {most} tokens",
        found=f"{lengths[row]}, of which {own} are the adapter's prompt" if own else int(lengths[row]),
        remedy="shorten it, or use a base with a longer context",
    )
