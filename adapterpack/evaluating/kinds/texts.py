"""Measures texts that a model writes: against the right ones, and by how likely these are to it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ...errors import ConfigError
from ...quantizing.comparing.figures import same
from ...runtime.sessions.session import Session
from ...tasks.conversations.encoding import by_row
from ...tasks.conversations.form import Conversation, read_form, text_of
from ...tasks.data.problems import IGNORED
from ...tasks.data.report import DataReport
from ...tasks.data.rows import Row
from ...tasks.targets import target_ids
from ..evaluation import (
    EVALUATIONS,
    AnsweredRows,
    EvaluatedModel,
    Evaluation,
    EvaluationRow,
    Judgement,
    read_rows,
)
from ..measures import ratio

_SPARE, _LONGEST = 8, 512
"""How many tokens an answer may exceed the longest right one by; the most tokens of an answer."""


def encode_rows(rows: Any, report: DataReport, model: EvaluatedModel) -> dict[int, tuple[Conversation, Any]]:
    """Returns row number, from 1, -> the conversation and the encoded parts of each row, as training reads
    them.

    Raises:
        ConfigError: a row is longer than ``max_length``, and such rows are not skipped.
    """
    seen: dict[int, Conversation] = {}

    def keep(number: int, conversation: Conversation) -> Conversation:
        seen[number] = conversation
        return conversation

    made = {}
    for number, parts in by_row(rows, model.tokenizer, model.max_length, report, keep).items():
        with report.row(number) as place:
            if not parts or (len(parts) == 1 and len(parts[0]["input_ids"]) == model.max_length):
                raise ConfigError(
                    "a row has no answer, or is too long",
                    where=place,
                    expected=f"less than {model.max_length} tokens",
                )
            made[number + 1] = seen[number], parts
    return made


def _read(rows: Any, report: DataReport, model: EvaluatedModel) -> list[EvaluationRow]:
    made = []
    for number, (conversation, parts) in encode_rows(rows, report, model).items():
        *before, last = conversation.messages
        ids, labels = parts[0]["input_ids"], parts[0]["labels"]
        learned = np.array([IGNORED, *labels]) != IGNORED
        start = np.flatnonzero(learned[1:] & ~learned[:-1])[-1]  # of the last answer
        asked = ({"prompt": ids[:start]},) if before else ()
        text = str(last.get("content") or "")
        place, shown = f"{report}, row {number}", str((before or [last])[-1]["content"])
        made.append(EvaluationRow(number, place, asked, shown, text, scored=tuple(parts)))
    return made


def _read_pairs(rows: Any, report: DataReport, model: EvaluatedModel) -> list[EvaluationRow]:
    form, tokenizer = read_form(rows, report), model.tokenizer

    def read(row: Row, place: object) -> tuple[Any, ...]:
        with form.errors(place):
            *before, last = form.read(row).messages
            source, text = (
                "\n".join(text_of(message["content"]) for message in before),
                text_of(last["content"]),
            )
        scored = {
            "input_ids": tokenizer(source)["input_ids"],
            "labels": target_ids(tokenizer, text, model.max_length, place),
        }
        return ({"text": source},), source, text, None, (scored,)

    return read_rows(rows, report, read)


def length_options(session: Session, rows: Sequence[EvaluationRow]) -> Mapping[str, Any]:
    """Returns the most tokens of an answer: a few more than the longest right one has."""
    longest = max(len(session.tokenizer.encode(row.expected, special=False)) for row in rows)
    return {"max_new_tokens": min(longest + _SPARE, _LONGEST)}


def _judge(rows: AnsweredRows) -> Judgement:
    measures, figures, badness = [], dict[str, np.ndarray](), np.zeros(len(rows.rows))
    answers = [reply.results[0]["completion"] if reply.results else "" for reply in rows.replies]
    if rows.rows[0].asked:
        pairs = [*zip(answers, rows.expected, strict=True)]
        figures = {"exact_match": np.array([same(*pair) for pair in pairs])}
        for name, values in zip("12L", np.array([rouge(*pair) for pair in pairs]).T, strict=True):
            figures[f"rouge{name}"] = values
        measures = [ratio(*one) for one in figures.items()]
        badness = badness - sum(figures.values())
    if rows.rows[0].scored:
        losses, tokens = np.array([np.sum(reply.losses, axis=0) for reply in rows.replies]).T
        mean = ratio("perplexity", losses, tokens, more_is_better=False)
        measures.append(mean._replace(value=lambda weights: np.exp(mean.value(weights))))
        figures["loss"] = losses / tokens
        badness = badness + 1e-3 * figures["loss"]  # tells rows apart that are as wrong
    return Judgement(measures, figures, badness, answers)


def rouge(answer: str, right: str) -> tuple[float, float, float]:
    """Returns ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004, https://aclanthology.org/W04-1013): F1 over words, over
    pairs of words, and over the longest common subsequence, without stemming.

    Example:
        >>> rouge("the red lamp", "The lamp")
        (0.8, 0.0, 0.8)
    """
    one, two = (re.findall(r"[^\W_]+", text.lower()) for text in (answer, right))
    counts = [[Counter(words), Counter(pairwise(words))] for words in (one, two)]
    common = [(a & b).total() for a, b in zip(*counts, strict=True)]
    most = len(one) + len(two)
    wholes = [most, max(most - 2, 1), most]
    first, second, longest = (
        2 * both / whole if both else 0.0
        for both, whole in zip([*common, longest_common(one, two)], wholes, strict=True)
    )
    return first, second, longest


def longest_common(one: Sequence[str], two: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence.

    Example:
        >>> longest_common("abcd", "xacyd")
        3
    """
    lengths, others = np.zeros(len(two) + 1, int), np.array([*two])
    for word in one:
        longer = np.where(others == word, lengths[:-1] + 1, lengths[1:])
        lengths[1:] = np.maximum.accumulate(np.maximum(longer, lengths[1:]))
    return int(lengths[-1])


EVALUATIONS.register(Evaluation("texts", ("text-generation",), _read, _judge, options=length_options))
EVALUATIONS.register(
    Evaluation("texts-of-texts", ("text2text-generation",), _read_pairs, _judge, options=length_options)
)
