"""Chats with a verdict on their last answer, as LLaMA-Factory has them for KTO: ``messages``, and ``label``,
which is true where that is good.
"""

from __future__ import annotations

from typing import Any

from ..conversations.form import require_answer
from ..data.rows import Row
from . import labelled_answers
from .form import PREFERENCES, PreferenceForm


def read(row: Row) -> dict[str, Any]:
    """The messages before the last answer, that answer, and the verdict."""
    *prompt, last = require_answer(row["messages"])
    return labelled_answers.read({"prompt": prompt, "completion": [last], "label": row["label"]})


PREFERENCES.register(PreferenceForm("labelled-chats", frozenset({"messages", "label"}), read, paired=False))
