"""The formats of preferences of TRL and LLaMA-Factory. Each function reads one row."""

from __future__ import annotations

from typing import Any

from ..conversations.builtin import read_alpaca, read_sharegpt
from ..conversations.form import Message, make_message, require_answer, tools_of
from ..data import Encoded, Row
from .form import PREFERENCES, PreferenceForm

_VERDICTS = {True: True, False: False, "true": True, "false": False}


def read_alpaca_pairs(row: Row) -> Encoded:
    """Reads two answers to an instruction in LLaMA-Factory's format: ``instruction`` and ``input``,
    ``chosen`` and ``rejected``.
    """
    *prompt, _ = read_alpaca({**row, "output": ""}).messages
    return {"prompt": prompt, "chosen": _answer(row["chosen"]), "rejected": _answer(row["rejected"])}


def read_labelled_answer(row: Row) -> Encoded:
    """Reads a single answer with a verdict, as KTO learns from them: ``prompt``, ``completion`` and
    ``label``, which is true for a good answer. Prompt and completion must have the same type.
    """
    verdict = row["label"].lower() if isinstance(row["label"], str) else row["label"]
    if verdict not in _VERDICTS:
        raise ValueError(f"the label is true or false, not {row['label']!r}")
    if type(row["prompt"]) is not type(row["completion"]) or not isinstance(row["prompt"], str | list):
        raise ValueError("prompt and completion must both be texts, or lists of messages")
    return {"prompt": row["prompt"], "completion": row["completion"], "label": _VERDICTS[verdict]}


def read_labelled_chat(row: Row) -> Encoded:
    """Reads a chat with a verdict on its last answer, in LLaMA-Factory's format for KTO: ``messages``, and
    ``label``, which is true for a good answer.
    """
    *prompt, last = require_answer(row["messages"])
    return read_labelled_answer({"prompt": prompt, "completion": [last], "label": row["label"]})


def read_pair(row: Row) -> Encoded:
    """Reads two answers in TRL's format: ``chosen`` and ``rejected``, after a separate ``prompt`` or
    beginning with it; all texts, or all lists of messages.
    """
    parts = {key: row[key] for key in ("prompt", "chosen", "rejected") if row.get(key) is not None}
    if {"chosen", "rejected"} - parts.keys():
        raise ValueError("an answer is missing")
    if len({type(value) for value in parts.values()}) > 1:
        raise ValueError("prompt and answers must all be texts, or all lists of messages")
    return {**parts, **tools_of(row)}


def read_chat_pair(row: Row) -> Encoded:
    """Reads two answers to a chat: ``messages``, and ``chosen`` and ``rejected`` as texts or messages."""
    answers = {side: _answer(row[side])[-1:] for side in ("chosen", "rejected")}
    return {"prompt": list(row["messages"]), **answers, **tools_of(row)}


def read_sharegpt_pair(row: Row) -> Encoded:
    """Reads two answers in a chat in LLaMA-Factory's format: ``conversations``, and ``chosen`` and
    ``rejected`` with ``from`` and ``value``.
    """
    whole = {
        side: read_sharegpt({**row, "conversations": [*row["conversations"], row[side]]})
        for side in ("chosen", "rejected")
    }
    answers = {side: conversation.messages[-1:] for side, conversation in whole.items()}
    return {"prompt": whole["chosen"].messages[:-1], **answers, **whole["chosen"].values}


def _answer(value: Any) -> list[Message]:
    """Returns an answer as messages; it may be a text, one message, or several."""
    if isinstance(value, str):
        return [make_message("assistant", value)]
    if value is None:
        raise ValueError("an answer is missing")
    return [dict(value)] if isinstance(value, dict) else list(value)


PREFERENCES.register(
    PreferenceForm(
        "alpaca-pairs",
        frozenset({"instruction", "chosen", "rejected"}),
        read_alpaca_pairs,
        frozenset({"input", "system", "history"}),
    )
)
PREFERENCES.register(
    PreferenceForm(
        "chat-pairs", frozenset({"messages", "chosen", "rejected"}), read_chat_pair, frozenset({"tools"})
    )
)
PREFERENCES.register(
    PreferenceForm(
        "labelled-answers", frozenset({"prompt", "completion", "label"}), read_labelled_answer, paired=False
    )
)
PREFERENCES.register(
    PreferenceForm("labelled-chats", frozenset({"messages", "label"}), read_labelled_chat, paired=False)
)
PREFERENCES.register(
    PreferenceForm("pairs", frozenset({"chosen", "rejected"}), read_pair, frozenset({"prompt", "tools"}))
)
PREFERENCES.register(
    PreferenceForm(
        "sharegpt-pairs",
        frozenset({"conversations", "chosen", "rejected"}),
        read_sharegpt_pair,
        frozenset({"system", "tools"}),
    )
)
