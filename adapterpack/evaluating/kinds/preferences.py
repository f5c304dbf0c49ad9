"""Measures how often a model finds the better of two answers more likely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from ...tasks.data.report import DataReport
from ...tasks.preferences.form import pairs_of_answers
from ..evaluation import (
    EVALUATIONS,
    AnsweredRows,
    EvaluatedModel,
    Evaluation,
    EvaluationRow,
    Judgement,
    RowReply,
)
from ..measures import ratio
from .texts import encode_rows

_SIDES = ("chosen", "rejected")


def _read(rows: Any, report: DataReport, model: EvaluatedModel) -> list[EvaluationRow]:
    pairs = pairs_of_answers(rows, report)
    numbers = [number for number in range(1, len(rows) + 1) if number - 1 not in report.bad]
    encoded = []
    for side in _SIDES:
        table = Dataset.from_list([_conversation(pair, side) for pair in pairs])
        encoded.append(encode_rows(table, DataReport(report.source, report.skips, numbers=numbers), model))
    return [
        EvaluationRow(
            number,
            f"{report}, row {number}",
            (),
            _text(pair.get("prompt", "")),
            _text(pair["chosen"]),
            scored=tuple(side[at][1][0] for side in encoded),
        )
        for at, (number, pair) in enumerate(zip(numbers, pairs, strict=True), 1)
        if all(at in side for side in encoded)
    ]


def _conversation(pair: Mapping[str, Any], side: str) -> dict[str, Any]:
    answer = pair[side]
    if "prompt" in pair:
        kept = {key: value for key, value in pair.items() if key not in _SIDES}
        return {**kept, "completion": answer}
    return {"messages" if isinstance(answer, list) else "text": answer}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(str(message["content"]) for message in value)


def _judge(rows: AnsweredRows) -> Judgement:
    margin = _margins(rows.replies)
    measures = [ratio("win_rate", margin > 0), ratio("margin", margin)]
    if rows.base is not None and rows.base is not rows.replies:
        gained = margin - _margins(rows.base)
        measures += [ratio("reward_accuracy", gained > 0), ratio("reward_margin", gained)]
    return Judgement(measures, {"margin": margin}, -margin, [_SIDES[int(one <= 0)] for one in margin])


def _margins(replies: Sequence[RowReply]) -> np.ndarray:
    """Returns by how much the better answer of each row is more likely, in nats."""
    losses = np.array([reply.losses for reply in replies])[..., 0]
    margins: np.ndarray = losses[:, 1] - losses[:, 0]
    return margins


EVALUATIONS.register(
    Evaluation("preferences", ("text-generation",), _read, _judge, columns=frozenset(_SIDES))
)
