"""Bounds the time of a base's chat template in other packages' trainers: each conversation is first rendered
in the sandbox.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ...chat.template import ChatTemplate


def with_bounded_template(tokenizer: Any) -> Any:
    """Replaces the tokenizer's ``apply_chat_template`` by one that first renders under limits of time, memory
    and length; returns the tokenizer.

    The templates that trainers bring themselves are limited, too.
    """
    tokenizer.apply_chat_template = partial(_apply, tokenizer)
    return tokenizer


def _apply(
    tokenizer: Any,
    conversation: Any,
    tools: Any = None,
    documents: Any = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
    **options: Any,
) -> Any:
    """Returns what ``apply_chat_template`` of transformers returns.

    Raises:
        OutOfLimits: the template exceeds the limits of time or memory.
        FormatError: the template fails to render.
    """
    template = ChatTemplate(
        tokenizer.get_chat_template(chat_template, tools), "the tokenizer's chat template"
    )
    values = {
        **tokenizer.special_tokens_map,
        "tools": tools,
        "documents": documents,
        "add_generation_prompt": add_generation_prompt,
    }
    several = bool(conversation) and not isinstance(conversation[0], Mapping)
    for messages in conversation if several else [conversation]:
        template.render(messages, values)
    return type(tokenizer).apply_chat_template(
        tokenizer, conversation, tools, documents, chat_template, add_generation_prompt, **options
    )
