"""Plain ``text``, all of it learned."""

from __future__ import annotations

from .form import FORMS, Conversation, DataForm, make_message

FORMS.register(
    DataForm(
        "text",
        frozenset({"text"}),
        lambda row: Conversation([make_message("assistant", row["text"])]),
        continuous=True,
        aliases=frozenset({"completion", "pretrain"}),
    )
)
