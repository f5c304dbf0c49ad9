"""``prompt`` and ``completion``, each a text or, as in TRL, a list of messages; only the completion is
learned.
"""

from __future__ import annotations

from typing import Any

from ..data.rows import Row
from .form import FORMS, Conversation, DataForm, Message, make_message, require_answer, tools_of


def read(row: Row) -> Conversation:
    """Returns the prompt, followed by the completion as the assistant's answer."""
    before = _messages(row["prompt"], "user")
    return Conversation(
        require_answer([*before, *_messages(row["completion"], "assistant")]), len(before), tools_of(row)
    )


def _messages(value: Any, role: str) -> list[Message]:
    return list(value) if isinstance(value, list) else [make_message(role, value)]


FORMS.register(DataForm("prompt-completion", frozenset({"prompt", "completion"}), read, frozenset({"tools"})))
