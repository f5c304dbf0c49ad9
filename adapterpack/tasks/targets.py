"""Encodes the answers that an encoder-decoder model learns."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError, excerpt


def target_ids(
    tokenizer: Any, text: Any, max_length: int, where: object, start: int | None = None
) -> list[int]:
    """Returns the ids of an answer with the end token; ``start``, which the decoder prepends itself, is not
    learned.

    Raises:
        ConfigError: the answer is not a text.
    """
    if not isinstance(text, str):
        raise ConfigError("a row without an answer", where=where, found=excerpt(text))
    ids: list[int] = tokenizer(text_target=text)["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    # Some tokenizers also write the start token, which the decoder prepends itself.
    if len(ids) > 1 and ids[0] == start:
        ids = ids[1:]
    return ids[:max_length]
