"""Chats in the format of OpenAI and TRL: ``messages`` with role and content; all of the assistant's turns are
learned.
"""

from __future__ import annotations

from ..data.rows import Row
from .form import FORMS, Conversation, DataForm, require_answer, tools_of


def read(row: Row) -> Conversation:
    """Returns the messages unchanged."""
    return Conversation(require_answer(row["messages"]), values=tools_of(row))


FORMS.register(
    DataForm(
        "messages",
        frozenset({"messages"}),
        read,
        frozenset({"tools"}),
        aliases=frozenset({"chat_template", "openai"}),
    )
)
