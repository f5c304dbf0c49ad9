"""Chats as OpenAI and TRL write them: ``messages`` of role and content; all turns of the assistant are
learned.
"""

from __future__ import annotations

from ..data.rows import Row
from .form import FORMS, Conversation, DataForm, require_answer, tools_of


def read(row: Row) -> Conversation:
    """The messages as they are."""
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
