"""Reads the small files that describe a model, as untrusted input: with limits of size, strict syntax, and
checked types. Checks that rows fit the context that its configuration states.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...errors import FormatError, excerpt
from ...io import Config, Json, read_file, strict_json
from ...tasks.data import RowError

MAX_JSON = 8 << 20
MAX_TEXT = 256 << 10
MAX_ID = (1 << 32) - 1
_KEYS = ("max_target_positions", "max_position_embeddings", "n_positions", "max_seq_len")
"""The configuration keys for the context length, the decoder's first."""
_SHORTEST = 1 << 16
_CHARACTERS = 16
_UNBOUNDED = 1 << 16
"""The smallest limit on the characters of a text; the most characters per token, averaged over a text; the
context in tokens that is assumed for a model without a limit.
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
"""Families that number positions from ``pad_token_id + 1``, so the first rows of their position table are
unused.
"""


def read_object(path: Path) -> Json:
    """Reads a JSON file with one object; returns an empty one if there is no such file.

    Raises:
        FormatError: the file is too large, no strict JSON, or no object.
    """
    if not path.exists():
        return {}
    # tokenizers write 10^30 for "no limit"
    value = strict_json.loads(read_bytes(path, MAX_JSON), path, MAX_JSON, max_integer=float("inf"))
    if not isinstance(value, dict):
        raise FormatError(
            "the file holds no JSON object", where=path, expected="an object", found=type(value).__name__
        )
    return value


def read_bytes(path: Path, most: int) -> bytes:
    """Reads a file of at most ``most`` bytes.

    Raises:
        FormatError: the file has more.
    """
    data = read_file(path, most + 1)
    if len(data) > most:
        raise FormatError("the file is too large", where=path, expected=f"at most {most} bytes")
    return data


def read_text(path: Path) -> str:
    """Reads a small text in UTF-8.

    Raises:
        FormatError: the file is too large, or no UTF-8.
    """
    try:
        return read_bytes(path, MAX_TEXT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"the file is no text in UTF-8: {error}", where=path) from error


def token_ids(config: Config, key: str, where: Path) -> tuple[int, ...]:
    """Returns the token ids under a key of a configuration, which may be one id, a list or missing.

    Raises:
        FormatError: the value is none of these.

    Example:
        >>> token_ids({"eos_token_id": [2, 5]}, "eos_token_id", Path("config.json"))
        (2, 5)
    """
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(one) is int and 0 <= one <= MAX_ID for one in ids):
        raise FormatError(
            "this is no token id",
            where=f"{where}#{key}",
            expected="a number from 0, or a list of them",
            found=excerpt(value),
        )
    return tuple(ids)


class Configured(Protocol):
    """A folder with its model's ``config.json``."""

    folder: Path

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration."""


def context_length(config: Config, where: object = None) -> int | None:
    """Returns the most positions of a row, or None if nothing bounds them, as with relative positions.

    Rotary positions could be computed for longer rows, but the length for which the model was trained counts.

    Raises:
        FormatError: the configuration has an invalid length.

    Example:
        >>> context_length({"max_position_embeddings": 514, "model_type": "roberta", "pad_token_id": 1})
        512
    """
    known = text_part(config, *_KEYS)
    if known.get("relative_attention_num_buckets") or (
        known.get("relative_attention") and not known.get("position_biased_input", True)
    ):
        return None  # relative positions work at any length
    key = next((key for key in _KEYS if known.get(key) is not None), None)
    if key is None:
        return None
    length = known[key]
    if type(length) is not int or length < 1:
        raise FormatError(
            "this is no number of positions",
            where=f"{where}#{key}" if where else key,
            expected="a number from 1",
            found=excerpt(length),
        )
    padding = known.get("pad_token_id")
    return (
        length - padding - 1 if known.get("model_type") in _AFTER_PADDING and type(padding) is int else length
    )


def text_part(config: Config, *keys: str) -> Mapping[str, Any]:
    """Returns the part of a configuration that has one of these keys: the configuration itself, or that of
    its language model.
    """
    inner = next(
        (part for name in ("text_config", "decoder") if isinstance(part := config.get(name), Mapping)), None
    )
    return config if inner is None or any(key in config for key in keys) else inner


def context_of(session: Configured) -> int | None:
    """Returns the :func:`context_length` of a session's model."""
    return context_length(session.config, session.folder / "config.json")


def most_characters(session: Configured) -> int:
    """Returns the most characters of a text that could fit the context. A longer text is refused before it is
    tokenized, which takes many times its length in memory and time.
    """
    return max(_SHORTEST, _CHARACTERS * (context_of(session) or _UNBOUNDED))


def require_context(session: Configured, lengths: np.ndarray, virtual: np.ndarray | int) -> None:
    """Checks that rows of these ``lengths`` ``[rows]`` fit the context; ``virtual`` of the positions belong
    to an adapter's prompt.

    Raises:
        RowError: a row is too long; names the first.
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
