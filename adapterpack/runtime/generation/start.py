"""The tokens that a decoder begins with which has an encoder to read the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import ConfigError, FormatError
from ..open_bundle import OpenBundle
from ..text.model_files import token_ids


def start_ids(session: OpenBundle) -> list[int]:
    """The tokens that a decoder's rows begin with: the start token, and those that the generation config
    forces after it.

    Raises:
        ConfigError: no file of the bundle names a start token.
        FormatError: one names something else there.
    """
    for name, config in (
        ("generation_config.json", session.generation_config),
        ("config.json", session.config),
    ):
        path = session.folder / name
        start = token_ids(config, "decoder_start_token_id", path)
        if start:
            return [start[0], *_forced(config.get("forced_decoder_ids"), path)]
    raise ConfigError(
        "the bundle names no token that its decoder starts with",
        where=session.folder,
        expected="decoder_start_token_id",
        remedy="add it to the base's generation_config.json and export again",
    )


def _forced(pairs: Any, where: Path) -> list[int]:
    """The tokens after the start, from ``[place, token]``; a place without a token is left to the model."""
    forced = pairs or []
    if not isinstance(forced, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int for pair in forced
    ):
        raise FormatError(
            "these are no forced tokens",
            where=f"{where}#forced_decoder_ids",
            expected="a list of [place, token]",
            found=repr(pairs)[:80],
        )
    tokens = {place: token_ids({"token": token}, "token", where) for place, token in forced}
    return [token for place in sorted(tokens) for token in tokens[place]]
