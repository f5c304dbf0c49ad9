"""Pairs of answers in TRL's format: ``chosen`` and ``rejected``, after a separate ``prompt`` or beginning
with it; texts or lists of messages.
"""

from __future__ import annotations

from typing import Any

from ..conversations.form import tools_of
from ..data.rows import Row
from .form import PREFERENCES, PreferenceForm


def read(row: Row) -> dict[str, Any]:
    """Returns the columns, after checking that they all have the same type."""
    parts = {key: row[key] for key in ("prompt", "chosen", "rejected") if row.get(key) is not None}
    if {"chosen", "rejected"} - parts.keys():
        raise ValueError("an answer is missing")
    if len({type(value) for value in parts.values()}) > 1:
        raise ValueError("prompt and answers must all be texts, or all lists of messages")
    return {**parts, **tools_of(row)}


PREFERENCES.register(
    PreferenceForm("pairs", frozenset({"chosen", "rejected"}), read, frozenset({"prompt", "tools"}))
)
