"""Pairs of answers in chats in LLaMA-Factory's format: ``conversations``, and ``chosen`` and ``rejected``
with ``from`` and ``value``.
"""

from __future__ import annotations

from typing import Any

from ..conversations import sharegpt
from ..data.rows import Row
from .form import PREFERENCES, PreferenceForm


def read(row: Row) -> dict[str, Any]:
    """Returns the conversation before the answer, and both answers."""
    whole = {
        side: sharegpt.read({**row, "conversations": [*row["conversations"], row[side]]})
        for side in ("chosen", "rejected")
    }
    answers = {side: conversation.messages[-1:] for side, conversation in whole.items()}
    return {"prompt": whole["chosen"].messages[:-1], **answers, **whole["chosen"].values}


PREFERENCES.register(
    PreferenceForm(
        "sharegpt-pairs",
        frozenset({"conversations", "chosen", "rejected"}),
        read,
        frozenset({"system", "tools"}),
    )
)
