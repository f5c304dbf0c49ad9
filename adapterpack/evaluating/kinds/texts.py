"""Measures texts that a model writes: against the right ones, and by how likely these are to it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ...errors import ConfigError
from ...io import Json
from ...quantizing.comparing.figures import same
from ...runtime import Session
from ...tasks.conversations.encoding import cut_up, join, pieces_of, require_end
from ...tasks.conversations.form import Conversation, read_form, text_of
from ...tasks.data import IGNORED, DataReport, Row
from ...tasks.image_text_to_text import PLACE, images_column, listed, without_parts
from ...tasks.targets import target_ids
from ...training.loop.media import content_of
from .. import (
    EVALUATIONS,
    AnsweredRows,
    EvaluatedModel,
    Evaluation,
    EvaluationRow,
    Judgement,
    RowParts,
    RowReader,
    ratio,
    read_rows,
)

_SPARE, _LONGEST = 8, 512
"""How many tokens an answer may exceed the longest right one by; the most tokens of an answer."""


def encode(
    conversation: Conversation, model: EvaluatedModel, place: object, continuous: bool = False
) -> list[Json]:
    """Returns the encoded parts of a conversation, as training reads them: one, or as many as a
    ``continuous`` text fills.

    Raises:
        ConfigError: it is longer than ``max_length``, or has no answer.
    """
    require_end(model.tokenizer, place)
    ids, labels = join([*pieces_of(conversation, model.tokenizer)])
    kept = cut_up(ids, labels, model.max_length, continuous)
    if not kept or (len(ids) > model.max_length and not continuous):
        raise ConfigError(
            "a row has no answer, or is too long", where=place, expected=f"at most {model.max_length} tokens"
        )
    return kept


def _read(rows: Any, report: DataReport) -> RowReader:
    form = read_form(rows, report)

    def read(model: EvaluatedModel, row: Row, place: object) -> RowParts:
        with form.errors(place):
            conversation = form.read(row)
        parts = encode(conversation, model, place, form.continuous)
        *before, last = conversation.messages
        ids, labels = parts[0]["input_ids"], parts[0]["labels"]
        learned = np.array([IGNORED, *labels]) != IGNORED
        start = np.flatnonzero(learned[1:] & ~learned[:-1])[-1]  # of the last answer
        asked = ({"prompt": ids[:start]},) if before else ()
        shown = str((before or [last])[-1]["content"])
        return asked, shown, str(last.get("content") or ""), None, tuple(parts)

    return read_rows(rows, report, read)


def _read_pairs(rows: Any, report: DataReport) -> RowReader:
    form = read_form(rows, report)

    def read(model: EvaluatedModel, row: Row, place: object) -> RowParts:
        tokenizer = model.tokenizer
        with form.errors(place):
            *before, last = form.read(row).messages
            source = "\n".join(text_of(message["content"]) for message in before)
            text = text_of(last["content"])
        scored = {
            "input_ids": tokenizer(source)["input_ids"],
            "labels": target_ids(tokenizer, text, model.max_length, place),
        }
        return ({"text": source},), source, text, None, (scored,)

    return read_rows(rows, report, read)


def _read_seen(rows: Any, report: DataReport) -> RowReader:
    column = images_column(rows, report)
    form = read_form(rows.remove_columns(column), report)

    def read(model: EvaluatedModel, row: Row, place: object) -> RowParts:
        with form.errors(place):
            conversation = form.read(row)
        *before, last = conversation.messages
        shown = text_of(before[-1]["content"]) if before else ""
        files = iter([content_of(one, place, "an image", "the path") for one in listed(row[column])])
        turns = [{**turn, "content": _with_files(text_of(turn["content"]), files)} for turn in before]
        prompt = {"prompt": shown} if conversation.verbatim else {"messages": turns}
        return ({**prompt, "image": [*files]},), shown, text_of(last["content"])

    return read_rows(without_parts(rows), report, read)


def _with_files(text: str, files: Iterator[str | bytes]) -> str | list[Json]:
    """Returns the content of a message: a text, or its parts where it has places of pictures."""
    first, *others = text.split(PLACE)
    parts: list[Json] = [{"type": "text", "text": first}]
    for other in others:
        parts += [{"type": "image", "image": next(files, None)}, {"type": "text", "text": other}]
    return parts if others else text


def length_options(session: Session, rows: Sequence[EvaluationRow]) -> Mapping[str, Any]:
    """Returns the most tokens of an answer: a few more than the longest right one has."""
    longest = max(len(session.tokenizer.encode(row.expected, special=False)) for row in rows)
    return {"max_new_tokens": min(longest + _SPARE, _LONGEST)}


def _judge(rows: AnsweredRows) -> Judgement:
    measures = []
    figures = {}
    badness = np.zeros(len(rows.rows))
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
    lengths = np.zeros(len(two) + 1, int)
    others = np.array([*two])
    for word in one:
        longer = np.where(others == word, lengths[:-1] + 1, lengths[1:])
        lengths[1:] = np.maximum.accumulate(np.maximum(longer, lengths[1:]))
    return int(lengths[-1])


for _name, _task, _reader in (
    ("texts", "text-generation", _read),
    ("texts-of-texts", "text2text-generation", _read_pairs),
    ("texts-of-images", "image-text-to-text", _read_seen),
):
    EVALUATIONS.register(Evaluation(_name, (_task,), _reader, _judge, options=length_options))
