"""Token classification: the label of every token of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError
from .data import (
    IGNORED,
    DataReport,
    Encoded,
    Labels,
    Result,
    Row,
    no_head,
    report_of,
    score_labels,
    types_of,
    words_of,
)
from .one_pass import NoOptions, OnePass, PreparedRow, text_inputs
from .session import Arrays, RowHead, RowInputs
from .task import HEADS, TASKS, Task, TaskTraining

LABEL_COLUMNS = ("labels", "ner_tags", "tags")
"""The names in data sets of the column with the labels of words; the first one present is used."""

OUTSIDE = "O"
"""The label of a word that belongs to no entity."""
_MARKS = "BIESLU"
"""The marks of a label before its type, in IOB2, IOBES and BILOU."""


def prepare(session: RowInputs, row: Row, options: NoOptions) -> PreparedRow:
    """Prepares a text, or token ids (``input_ids``)."""
    inputs = text_inputs(session, row)
    return PreparedRow(inputs, row.get("text", row.get("prompt")))


def result(
    session: RowInputs, row: PreparedRow, outputs: Arrays, head: RowHead, options: NoOptions
) -> Result:
    """Returns ``tokens``: the text of each, its character positions, its label and that label's probability;
    and ``entities``: the type, text and characters of each, by the labels of the first tokens of words. For
    token ids it returns the ``tokens`` with label and probability alone.
    """
    if head.labels is None:
        return no_head("label")
    text = row.notes
    tokens = []
    words = dict[int, list[dict[str, Any]]]()
    if text is None:
        found = [score_labels(logits, head.labels) for logits in outputs["logits"][0, : row.tokens]]
        return {"tokens": [{"label": one["label"], "score": one["scores"][one["label"]]} for one in found]}
    for place, (start, stop, word) in enumerate(session.tokenizer.places(text)):
        if stop > start:  # special tokens cover no characters
            best = score_labels(outputs["logits"][0, place], head.labels)
            label = best["label"]
            token = {"text": text[start:stop], "start": start, "end": stop}
            tokens.append({**token, "label": label, "score": best["scores"][label]})
            if word is not None:
                words.setdefault(word, []).append(tokens[-1])
    spans = list(words.values())
    found = []
    for kind, first, last in sorted(entities([span[0]["label"] for span in spans]), key=lambda one: one[1:]):
        start = spans[first][0]["start"]
        stop = spans[last][-1]["end"]
        found.append({"type": kind, "text": text[start:stop], "start": start, "end": stop})
    return {"entities": found, "tokens": tokens}


def encode(rows: Any, tokenizer: Any, max_length: int, where: object, labels: Labels) -> list[Encoded]:
    """Returns token ids, and the label of each word at its first token. The columns are ``tokens``, lists of
    words, and ``labels``, ``ner_tags`` or ``tags``, with one label per word; both may also be texts with
    spaces between the items.

    Raises:
        ConfigError: other columns, a row with different numbers of words and labels or without any, or a
            label that is not among ``labels``.
    """
    report = report_of(where)
    column = label_column(rows, report)

    def encode_row(row: Row, place: object) -> Encoded:
        words, wanted = words_and_labels(row, column, place)
        tokens = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
        targets = [labels.target(label, place) for label in wanted]
        of_words = tokens.word_ids()
        # Only the first token of a word carries its label, so that long words do not weigh more in the
        # loss.
        first_place = {word: at for at, word in reversed([*enumerate(of_words)])}
        firsts = [
            targets[word] if word is not None and first_place[word] == at else IGNORED
            for at, word in enumerate(of_words)
        ]
        report.cut += max((word for word in of_words if word is not None), default=-1) < len(words) - 1
        return {"input_ids": tokens["input_ids"], "labels": firsts, **types_of(tokens)}

    return report.encode(rows, encode_row)


def label_column(rows: Any, report: DataReport) -> str:
    """Returns the column of the labels of words, and records the columns as the format of the rows.

    Raises:
        ConfigError: a column is missing.
    """
    return report.read_pair(rows.column_names, "tokens", LABEL_COLUMNS, "token classification needs")


def words_and_labels(row: Row, column: str, place: object) -> tuple[list[str], list[Any]]:
    """Returns the words of a row, and the label of each.

    Raises:
        ConfigError: the row has none, or another number of labels.
    """
    words = words_of(row["tokens"])
    wanted = words_of(row[column])
    if (
        not words
        or not isinstance(wanted, list)
        or len(words) != len(wanted)
        or not all(isinstance(word, str) for word in words)
    ):
        raise ConfigError(
            "a row needs words and as many labels: lists, or texts with spaces between them",
            where=place,
            found=f"{words!r:.80} and {wanted!r:.80}",
        )
    return words, wanted


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Returns the entities that labels mark, each with its type, first and last word, as conlleval and
    seqeval count them: one begins at a mark that begins, or where the type changes. A label without a mark is
    a type.

    Example:
        >>> sorted(entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
        [('LOC', 3, 3), ('LOC', 4, 4), ('PER', 0, 1)]
    """
    found = set()
    start = 0
    before = (OUTSIDE, "")
    for at, tag in enumerate([*tags, OUTSIDE]):
        marked = tag[0] in _MARKS and tag[1:2] in ("", "-")
        now = (tag, "") if tag == OUTSIDE else (tag[0], tag[2:]) if marked else ("I", tag)
        begins = now[0] != OUTSIDE and (now[0] in "BSU" or before[0] in "OESLU" or now[1] != before[1])
        if before[0] != OUTSIDE and (begins or now[0] == OUTSIDE):
            found.add((before[1], start, at - 1))
        start = at if begins else start
        before = now
    return found


def metrics(outputs: Any, targets: Any, names: Sequence[str]) -> dict[str, float]:
    """Returns F1 of the entities, and the share of words with the right label."""
    learned = targets != IGNORED
    best = np.argmax(outputs, -1)
    right = 0
    wanted = 0
    given = 0
    for row, own in enumerate(learned):
        one, two = (entities([names[at] for at in side[row][own]]) for side in (best, targets))
        right += len(one & two)
        wanted += len(two)
        given += len(one)
    accuracy = float((best == targets)[learned].mean())
    return {"accuracy": accuracy, "f1": 2 * right / (wanted + given) if wanted + given else 1.0}


TASKS.register(
    Task(
        "token-classification",
        "AutoModelForTokenClassification",
        OnePass(prepare, result),
        ("ForTokenClassification",),
        heads=HEADS,
        labelled=True,
        training=TaskTraining(encode, metrics=metrics, label_columns=LABEL_COLUMNS, parts=words_of),
        peft_type="TOKEN_CLS",
    )
)
