"""Instructions in Alpaca's format: ``instruction``, ``input`` and ``output``, with LLaMA-Factory's ``system``
and ``history``.
"""

from __future__ import annotations

from ..data.rows import Row
from .form import FORMS, Conversation, DataForm, make_message, text_of


def read(row: Row) -> Conversation:
    """Returns the history (pairs of question and answer), then the instruction with its input and the
    answer.
    """
    before = [make_message("system", row["system"])] if row.get("system") else []
    history = [
        make_message(role, text)
        for pair in row.get("history") or ()
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    question = "\n\n".join([text_of(text) for text in (row["instruction"], row.get("input")) if text])
    return Conversation(
        [*before, *history, make_message("user", question), make_message("assistant", row["output"])]
    )


FORMS.register(
    DataForm("alpaca", frozenset({"instruction", "output"}), read, frozenset({"input", "system", "history"}))
)
