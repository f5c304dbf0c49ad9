"""Chats with a verdict on their last answer, in LLaMA-Factory's format for KTO: ``messages``, and ``label``,
which is true for a good answer.
"""

from __future__ import annotations

from typing import Any

from ..conversations.form import require_answer
from ..data.rows import Row
from . import labelled_answers
from .form import PREFERENCES, PreferenceForm


def read(row: Row) -> dict[str, Any]:
    """Returns the messages before the last answer, that answer, and the verdict."""
    *prompt, last = require_answer(row["messages"])
    return labelled_answers.read({"prompt": prompt, "completion": [last], "label": row["label"]})


PREFERENCES.register(PreferenceForm("labelled-chats", frozenset({"messages", "label"}), read, paired=False))
