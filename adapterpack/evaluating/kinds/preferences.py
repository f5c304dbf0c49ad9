"""Measures how often a model prefers the better of two answers, or tells good answers from bad ones: by how
likely they are to it, or by its scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...errors import ConfigError
from ...tasks.conversations.form import FORMS
from ...tasks.data import NUMBER, DataReport, Row
from ...tasks.preferences.form import read_answers
from .. import (
    EVALUATIONS,
    AnsweredRows,
    EvaluatedModel,
    Evaluation,
    Judgement,
    Measure,
    RowParts,
    RowReader,
    of_sums,
    ratio,
    read_rows,
)
from ..evaluation import ReadRows, RowReply
from .texts import encode

_SIDES = ("chosen", "rejected")


def _reader(encode_answer: Callable[..., Any], paired: bool = True, asks: bool = False) -> ReadRows:
    """Returns a reader of rows with two answers, or one with a verdict: the model gives their likelihood, or
    with ``asks`` their scores.
    """

    def read_table(rows: Any, report: DataReport) -> RowReader:
        read_row = read_answers(rows, report, paired)
        sides = _SIDES if paired else ("completion",)

        def read(model: EvaluatedModel, row: Row, place: object) -> RowParts:
            read = read_row(row, place)
            encoded = tuple(encode_answer(read, read[side], model, place) for side in sides)
            asked, scored = (encoded, ()) if asks else ((), encoded)
            return asked, _text(read.get("prompt", "")), _text(read[sides[0]]), read.get("label"), scored

        return read_rows(rows, report, read)

    return read_table


def _likely(row: Row, answer: Any, model: EvaluatedModel, place: object) -> Any:
    """Encodes an answer whose likelihood is measured, as training does."""
    alone = "messages" if isinstance(answer, list) else "text"
    form = FORMS["prompt-completion" if "prompt" in row else alone]
    with form.errors(place):
        conversation = form.read({**row, "completion": answer, "messages": answer, "text": answer})
    return encode(conversation, model, place)[0]


def _scored(row: Row, answer: Any, model: EvaluatedModel, place: object) -> dict[str, Any]:
    """Encodes an answer, after its prompt, for a model that scores it, as TRL does.

    Raises:
        ConfigError: the model has labels.
    """
    assert model.labels is not None
    if model.labels.problem is not NUMBER:
        raise ConfigError(
            "answers are compared by a model that scores them, and this one has labels",
            where=place,
            found=", ".join(model.labels.names),
        )
    tokenizer = model.tokenizer
    whole = row["prompt"] + answer if "prompt" in row else answer
    if isinstance(whole, str):
        return {"input_ids": tokenizer(whole.removesuffix(end := tokenizer.eos_token) + end)["input_ids"]}
    return {"input_ids": tokenizer.apply_chat_template(whole, tools=row.get("tools"), return_dict=False)}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(str(message["content"]) for message in value)


def _judge(rows: AnsweredRows) -> Judgement:
    margin = -np.diff(_values(rows.replies))[:, 0]
    measures = [ratio("win_rate", margin > 0), ratio("margin", margin)]
    if rows.base is not None and rows.base is not rows.replies:
        gained = margin + np.diff(_values(rows.base))[:, 0]
        measures += [ratio("reward_accuracy", gained > 0), ratio("reward_margin", gained)]
    return Judgement(measures, {"margin": margin}, -margin, [_SIDES[int(one <= 0)] for one in margin])


def _judge_verdicts(rows: AnsweredRows) -> Judgement:
    value = _values(rows.replies)[:, 0]
    good = np.array([row.known for row in rows.rows])
    measures = [_gap("margin", value, good)]
    name = "log_likelihood"
    if rows.base is not None and rows.base is not rows.replies:
        value = value - _values(rows.base)[:, 0]
        name = "reward"
        measures += [ratio("reward_accuracy", (value > 0) == good), _gap("reward_margin", value, good)]
    return Judgement(measures, {name: value}, np.where(good, -value, value), value.tolist())


def _gap(name: str, value: np.ndarray, good: np.ndarray) -> Measure:
    """Returns by how much the mean of good rows exceeds that of bad ones."""
    parts = value * good, good, value * ~good, ~good
    return of_sums(name, parts, lambda best, goods, worst, bads: best / goods - worst / bads)


def _values(replies: Sequence[RowReply]) -> np.ndarray:
    """Returns the log-likelihood, in nats, or the score of each answer ``[rows, answers]``."""
    return np.array(
        [
            [-loss for loss, _ in reply.losses]
            or [next(iter(result["scores"].values())) for result in reply.results]
            for reply in replies
        ]
    )


_read = _reader(_likely)
_read_verdicts = _reader(_likely, paired=False)
for _name, _task, _columns, _read_rows, _judge_rows in (
    ("preferences", "text-generation", _SIDES, _read, _judge),
    ("scores", "text-classification", _SIDES, _reader(_scored, asks=True), _judge),
    ("verdicts", "text-generation", ("completion", "label"), _read_verdicts, _judge_verdicts),
    ("verdicts-on-chats", "text-generation", ("messages", "label"), _read_verdicts, _judge_verdicts),
):
    EVALUATIONS.register(Evaluation(_name, (_task,), _read_rows, _judge_rows, frozenset(_columns)))
