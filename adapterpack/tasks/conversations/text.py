"""Plain ``text``, all of which is learned."""

from __future__ import annotations

from .form import FORMS, Conversation, DataForm, said

FORMS.register(
    DataForm(
        "text",
        frozenset({"text"}),
        lambda row: Conversation([said("assistant", row["text"])]),
        continuous=True,
        aliases=frozenset({"completion", "pretrain"}),
    )
)
