"""The formats of training data that other tools use. Each function reads one row."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..data import ROLES, Row
from .form import (
    FORMS,
    Conversation,
    DataForm,
    Message,
    make_message,
    read_written,
    require_answer,
    text_of,
    tools_of,
    turns_of,
)
from .written_prompt import WrittenPrompt

_ANSWER = "Write a response that appropriately completes the request."
ALPACA = WrittenPrompt(
    format="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    no_input_format="### Instruction:\n{instruction}\n\n### Response:\n",
    system_format="{system}\n\n",
    system_prompt=(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        f"{_ANSWER}"
    ),
    no_input_system_prompt=f"Below is an instruction that describes a task. {_ANSWER}",
)
"""Alpaca's original prompt, https://github.com/tatsu-lab/stanford_alpaca."""


def read_alpaca(row: Row) -> Conversation:
    """Reads an instruction in Alpaca's format, ``instruction``, ``input`` and ``output``, with
    LLaMA-Factory's ``system`` and ``history``: the history (pairs of question and answer), then the
    instruction with its input and the answer.
    """
    history = [
        make_message(role, text)
        for pair in row.get("history") or ()
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    question = "\n\n".join([text_of(text) for text in (row["instruction"], row.get("input")) if text])
    answer = make_message("assistant", row["output"])
    return Conversation([*_system(row), *history, make_message("user", question), answer])


def read_segments(row: Row) -> Conversation:
    """Reads texts of which those with a ``label`` are learned, and adds nothing to them."""
    turns = [
        make_message("assistant" if segment["label"] else "user", segment["text"])
        for segment in turns_of(row["segments"])
    ]
    return Conversation(turns, segments=True)


def read_messages(row: Row) -> Conversation:
    """Reads a chat in the format of OpenAI and TRL: ``messages`` with role and content, and all of the
    assistant's turns are learned.
    """
    return Conversation(require_answer(row["messages"]), values=tools_of(row))


def read_prompt_completion(row: Row) -> Conversation:
    """Reads ``prompt`` and ``completion``, each a text or, as in TRL, a list of messages; only the completion
    is learned.
    """

    def messages(value: Any, role: str) -> list[Message]:
        return list(value) if isinstance(value, list) else [make_message(role, value)]

    before = messages(row["prompt"], "user")
    whole = require_answer([*before, *messages(row["completion"], "assistant")])
    return Conversation(whole, len(before), tools_of(row))


def read_sharegpt(row: Row) -> Conversation:
    """Reads a chat in ShareGPT's format: ``conversations`` with ``from`` and ``value``, and with other names
    for the roles, after the text of the column ``system`` if there is one.
    """
    turns = []
    for turn in turns_of(row["conversations"]):
        if turn["from"] not in ROLES:
            raise ValueError(f"{turn['from']!r} is none of the roles {', '.join(ROLES)}")
        turns.append(make_message(ROLES[turn["from"]], turn["value"]))
    return Conversation(require_answer([*_system(row), *turns]), values=tools_of(row))


def _system(row: Row) -> list[Message]:
    return [make_message("system", row["system"])] if row.get("system") else []


FORMS.register(
    DataForm(
        "alpaca",
        frozenset({"instruction", "output"}),
        read_alpaca,
        frozenset({"input", "system", "history"}),
    )
)
FORMS.register(
    DataForm(
        "alpaca-prompt",
        frozenset({"instruction", "output"}),
        partial(read_written, ALPACA),
        frozenset({"input", "system"}),
        remark="in Alpaca's prompt, without the chat template; run such prompts with --raw",
    )
)
FORMS.register(
    DataForm(
        "messages",
        frozenset({"messages"}),
        read_messages,
        frozenset({"tools"}),
        aliases=frozenset({"chat_template", "openai"}),
    )
)
FORMS.register(
    DataForm(
        "prompt-completion",
        frozenset({"prompt", "completion"}),
        read_prompt_completion,
        frozenset({"tools"}),
    )
)
FORMS.register(
    DataForm(
        "segments",
        frozenset({"segments"}),
        read_segments,
        aliases=frozenset({"input_output"}),
        remark="as they are, with no end token",
    )
)
FORMS.register(
    DataForm("sharegpt", frozenset({"conversations"}), read_sharegpt, frozenset({"system", "tools"}))
)
FORMS.register(
    DataForm(  # plain text, all of it learned
        "text",
        frozenset({"text"}),
        lambda row: Conversation([make_message("assistant", row["text"])]),
        continuous=True,
        aliases=frozenset({"completion", "pretrain"}),
    )
)
