"""Keeps a base's chat template from taking any time where another package's trainer renders it: each
conversation is rendered in the sandbox first.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ...chat.template import ChatTemplate


def with_bounded_template(tokenizer: Any) -> Any:
    """The tokenizer itself, whose ``apply_chat_template`` now renders under limits of time, memory and length
    before it renders as ever.

    The templates that trainers bring themselves are rendered so, too.
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
    """What ``apply_chat_template`` of transformers gives.

    Raises:
        OutOfLimits: the template takes more time or memory than a template needs.
        FormatError: it does not render.
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
