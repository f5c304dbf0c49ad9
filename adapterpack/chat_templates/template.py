"""Renders messages with a model's chat template, in a sandbox, because the template is untrusted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError, FormatError
from ..sandbox.limits import SandboxLimits
from ..sandbox.sandbox import Sandbox

Message = Mapping[str, Any]

MAX_SOURCE = 256 << 10
_FAILS = "the chat template does not render"
_REMEDY = "give a list of token ids, or use a tokenizer with another chat template"
_SANDBOX = Sandbox(
    "adapterpack.chat_templates.rendering:render", SandboxLimits(memory=256 << 20, seconds=1), kept=2
)


class ChatTemplate:
    """A chat template; ``where`` is its origin in errors.

    Example:
        >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
        >>> template.render([{"role": "user", "content": "Hi"}])
        '<user>Hi'
    """

    def __init__(self, source: str, where: object = None) -> None:
        self.source, self.where = source, where

    def render(self, messages: Sequence[Message], values: Mapping[str, Any] | None = None) -> str:
        """Renders messages up to the point where the model's answer begins. ``values`` are further variables,
        such as special tokens.

        Raises:
            ConfigError: the messages contain values that JSON lacks.
            OutOfLimits: the template exceeds the limits of time or memory.
            FormatError: the template cannot be compiled, or does not render.
        """
        if len(self.source) > MAX_SOURCE:
            raise FormatError(
                f"{_FAILS}: it has {len(self.source)} characters, and {MAX_SOURCE} are the most",
                where=self.where,
                remedy=_REMEDY,
            )
        given = {
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **(values or {}),
        }
        try:
            request = json.dumps([self.source, given]).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"the messages cannot be given to a chat template: {error}",
                expected="what JSON has",
                remedy="use texts, numbers, lists and mappings, nested a few levels deep",
            ) from error
        return _SANDBOX.run(request, _FAILS, self.where, _REMEDY).decode("utf-8", "surrogatepass")
