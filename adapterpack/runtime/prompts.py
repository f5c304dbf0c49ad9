"""Tokenizes prompts (a text, chat messages or token ids), and finds the tokens with which a decoder
starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError
from .open_bundle import OpenBundle
from .text.model_files import MAX_ID, text_part, token_ids

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
"""A text (for a decoder: one user message), a list of messages, or a list of token ids."""


def prompt_ids(
    session: OpenBundle, prompt: Prompt, tools: Sequence[Mapping[str, Any]] = (), raw: bool = False
) -> list[int]:
    """Returns the token ids of a prompt. ``tools`` are passed to the chat template; with ``raw`` a text is
    tokenized without the template.

    Raises:
        ConfigError: the prompt is of no known form, has no tokens or a token that the model lacks, or is
            ``raw`` and consists of messages.
    """
    items = [prompt] if isinstance(prompt, str) else list(prompt)
    if items and all(type(item) is int for item in items):
        return _checked_ids(session, items)  # type: ignore[arg-type]
    if not isinstance(prompt, str) and not all(
        isinstance(item, Mapping) and "content" in item for item in items
    ):
        raise ConfigError(
            "a prompt is a text, a list of messages with role and content, or a list of token ids",
            found=repr(prompt)[:80],
        )
    if raw and not isinstance(prompt, str):
        raise ConfigError(
            "messages cannot be read without the chat template",
            found=repr(prompt)[:80],
            remedy="give a text as prompt, or leave --raw (raw=True) out",
        )
    # encoder-decoders take no chat template
    if isinstance(prompt, str) and (raw or not session.task.pads_left):
        ids = session.tokenizer.encode(prompt)
    else:
        ids = session.tokenizer.prompt(prompt, tools) if items else []  # type: ignore[arg-type]
    if not ids:
        raise ConfigError("a prompt has no tokens", found=repr(prompt)[:80])
    return ids


def _checked_ids(session: OpenBundle, ids: list[int]) -> list[int]:
    """Checks that the model has the ids of a caller, and returns them."""
    vocabulary = text_part(session.config, "vocab_size").get("vocab_size")
    most = vocabulary - 1 if type(vocabulary) is int else MAX_ID
    wrong = next((token for token in ids if not 0 <= token <= most), None)
    if wrong is not None:
        raise ConfigError(
            "a prompt has a token that the model does not have",
            expected=f"0 to {most}",
            found=str(wrong)[:40],
        )
    return ids


def start_ids(session: OpenBundle) -> list[int]:
    """Returns the tokens with which a decoder's rows begin: the start token, and those that the generation
    config forces after it.

    Raises:
        ConfigError: no file of the bundle names a start token.
        FormatError: a file has something else in that place.
    """
    for name, config in (
        ("generation_config.json", session.generation_config),
        ("config.json", session.config),
    ):
        path = session.folder / name
        start = token_ids(config, "decoder_start_token_id", path)
        if start:
            return [start[0], *_forced_ids(config.get("forced_decoder_ids"), path)]
    raise ConfigError(
        "the bundle names no token that its decoder starts with",
        where=session.folder,
        expected="decoder_start_token_id",
        remedy="add it to the base's generation_config.json and export again",
    )


def _forced_ids(pairs: Any, where: Path) -> list[int]:
    """Returns the forced tokens after the start token, from pairs ``[place, token]``; the model chooses at a
    place without a token.
    """
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
