"""Chats in ShareGPT's format: ``conversations`` with ``from`` and ``value``, and with other names for the
roles.
"""

from __future__ import annotations

from ..data.rows import Row
from .form import FORMS, Conversation, DataForm, make_message, require_answer, tools_of, turns_of

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}
"""ShareGPT's role -> role of a chat message."""


def read(row: Row) -> Conversation:
    """Returns the turns, after the text of the column ``system`` if there is one."""
    before = [make_message("system", row["system"])] if row.get("system") else []
    turns = []
    for turn in turns_of(row["conversations"]):
        if turn["from"] not in ROLES:
            raise ValueError(f"{turn['from']!r} is none of the roles {', '.join(ROLES)}")
        turns.append(make_message(ROLES[turn["from"]], turn["value"]))
    return Conversation(require_answer([*before, *turns]), values=tools_of(row))


FORMS.register(DataForm("sharegpt", frozenset({"conversations"}), read, frozenset({"system", "tools"})))
