"""Extractive question answering: the span of a context that answers a question."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..readable import things
from .conversations.form import text_of
from .data import DataReport, Encoded, Labels, Result, Row, no_head, probabilities, report_of, types_of
from .one_pass import NoOptions, OnePass, PreparedRow
from .session import Arrays, RowHead, RowInputs
from .task import MAIN, SPANS, TASKS, TEXT, Part, Task, TaskTraining

log = logging.getLogger(__name__)

LONGEST = 30
"""The most tokens of an answer."""


def prepare(session: RowInputs, row: Row, options: NoOptions) -> PreparedRow:
    """Prepares a question and its context, and notes which characters of the context each token covers."""
    question, context = _question(row)
    inputs, (spans,) = session.encode_pairs([(question, context)])
    return PreparedRow(inputs, (context, spans))


def result(
    session: RowInputs, row: PreparedRow, outputs: Arrays, head: RowHead, options: NoOptions
) -> Result:
    """Returns the most likely span of the context and its character positions; the span is empty if no answer
    is more likely.
    """
    if not head.trained:
        return no_head("answer")
    context, spans = row.notes
    starts, ends = (outputs[side][0][: len(spans)] for side in SPANS)
    start, end, score = best_span(starts, ends, [span is not None for span in spans])
    (first, _), (_, last) = (spans[at] or (0, 0) for at in (start, end))
    return {"answer": context[first:last], "start": first, "end": last, "score": round(score, 6)}


def _question(row: Row) -> tuple[str, str]:
    question = row.get("question", row.get("prompt"))
    context = row.get("context")
    if not isinstance(question, str) or not isinstance(context, str):
        raise ConfigError("a row of this task needs question and context", found=", ".join(map(str, row)))
    return question, context


def best_span(starts: np.ndarray, ends: np.ndarray, inside: Sequence[bool]) -> tuple[int, int, float]:
    """Returns the span of at most :data:`LONGEST` tokens, all ``inside``, with the largest sum of logits, and
    its probability; the first token represents "no answer" (Devlin et al. 2019,
    https://arxiv.org/abs/1810.04805, section 4.3).

    Example:
        >>> best_span(np.array([0.0, 1, 9, 0]), np.array([0.0, 0, 1, 9]), [False, True, True, True])[:2]
        (2, 3)
    """
    # allowed[i, j]: a span from i to j with i <= j < i + LONGEST, both ends inside the context.
    allowed = np.triu(np.ones((len(starts), len(starts)), bool)) & ~np.triu(
        np.ones((len(starts), len(starts)), bool), LONGEST
    )
    allowed &= np.outer(inside, inside)
    allowed[0, 0] = True
    chances = [probabilities(np.where([True, *inside[1:]], side, -np.inf)) for side in (starts, ends)]
    spans = np.where(allowed, np.outer(*chances), -1.0)
    start, end = np.unravel_index(int(spans.argmax()), spans.shape)
    return int(start), int(end), float(spans[start, end])


def encode(
    rows: Any, tokenizer: Any, max_length: int, where: object, labels: Labels | None = None
) -> list[Encoded]:
    """Returns token ids of question and context, and the positions where the answer begins and ends. The
    columns are ``question``, ``context`` and ``answers`` (lists ``text`` and ``answer_start``, whose first
    entries are used), as in SQuAD. A CSV or TSV file may have ``answer`` instead of ``answers``, with
    ``answer_start`` if the context contains the answer more than once.

    A question without an answer has both positions at the first token. Contexts are cut at ``max_length``;
    rows whose answer is cut off are left out, with a warning.

    Raises:
        ConfigError: other columns, an answer that is not in its context, or no row is left.
    """
    encoded = []
    left_out = 0
    report = report_of(where)
    flat = is_flat(rows, report)
    for number, row in enumerate(rows):
        with report.row(number) as place:
            question, context, start, stop = read_question(row, flat, place)
            tokens = tokenizer(
                question,
                context,
                truncation="only_second",
                max_length=max_length,
                return_offsets_mapping=True,
            )
            spans = tokens["offset_mapping"]
            inside = [
                at
                for at, side in enumerate(tokens.sequence_ids())
                if side == 1 and spans[at][0] < stop and spans[at][1] > start
            ]
            if stop and (not inside or spans[inside[-1]][1] < stop):
                left_out += 1
                continue
            first, last = (inside[0], inside[-1]) if stop else (0, 0)
            encoded.append(
                {
                    "input_ids": tokens["input_ids"],
                    "start_positions": first,
                    "end_positions": last,
                    **types_of(tokens),
                }
            )
    report.left_out = left_out
    if left_out and not encoded:
        raise ConfigError(
            "every answer lies beyond max_length, so there is nothing to learn",
            where=where,
            found=f"max_length {max_length}",
            remedy="raise max_length",
        )
    if left_out:
        log.warning(
            "%s: left out %d of %s, as the answer lies beyond max_length (%d)",
            where,
            left_out,
            things(len(rows), "row"),
            max_length,
        )
    return encoded


def is_flat(rows: Any, report: DataReport) -> bool:
    """Returns whether rows have ``answer`` instead of ``answers``, and records that as their format.

    Raises:
        ConfigError: a column is missing.
    """
    flat = "answers" not in rows.column_names
    if not {"question", "context", "answer" if flat else "answers"} <= set(rows.column_names):
        raise ConfigError(
            "question answering needs the columns question, context, and answers or answer",
            where=report,
            found=", ".join(rows.column_names),
        )
    report.read_as(
        "answers" if flat else "SQuAD",
        rows.column_names,
        {"question", "context", *(("answer", "answer_start") if flat else ("answers",))},
    )
    return flat


def read_question(row: Row, flat: bool, place: object) -> tuple[str, str, int, int]:
    """Returns the question and the context of a row, and where its answer begins and ends in it.

    Raises:
        ConfigError: the row does not have them.
    """
    try:
        found = _place_of_only(row) if flat else _place_of_first(row)
        return text_of(row["question"]), text_of(row["context"]), *found
    except (KeyError, TypeError, ValueError) as error:
        what = "a row holds no question with its answer" if flat else "a row is not of the form of SQuAD"
        raise ConfigError(f"{what}: {error}", where=place) from error


def _place_of_first(row: Row) -> tuple[int, int]:
    """Returns where the first answer of a row is in its context; ``(0, 0)`` if there is none."""
    texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
    return _place(row["context"], text_of(texts[0]), int(starts[0])) if texts else (0, 0)


def _place(context: str, text: str, start: int) -> tuple[int, int]:
    if not text or context[start : start + len(text)] != text:
        raise ValueError(f"the answer {text!r} is not at {start} of its context")
    return start, start + len(text)


def _place_of_only(row: Row) -> tuple[int, int]:
    """Returns where the answer of a row without lists is in its context; ``(0, 0)`` if there is none."""
    text = row["answer"]
    start = row.get("answer_start")
    if text is None or text == "":
        return 0, 0
    count = row["context"].count(text_of(text))
    if not count:
        raise ValueError(f"the answer {text!r} is not in its context")
    if start is None and count > 1:
        raise ValueError(
            f"the answer {text!r} is {count} times in its context, and no answer_start says which is meant"
        )
    return _place(row["context"], text, row["context"].find(text) if start is None else int(start))


def metrics(outputs: Any, labels: Any) -> dict[str, float]:
    """Returns the share of answers that begin and end at the right positions."""
    right = [np.argmax(logits, -1) == places for logits, places in zip(outputs[:2], labels, strict=True)]
    return {"accuracy": float(np.logical_and(*right).mean())}


TASKS.register(
    Task(
        "question-answering",
        "AutoModelForQuestionAnswering",
        OnePass(prepare, result),
        ("ForQuestionAnswering",),
        parts=(Part(MAIN, "plain", (*TEXT, "token_type_ids")),),
        heads=("qa_outputs",),
        training=TaskTraining(encode, ("start_positions", "end_positions"), metrics),
        peft_type="QUESTION_ANS",
    )
)
