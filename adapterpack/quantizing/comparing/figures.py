"""Measures one form of a bundle on rows: perplexity, right answers, the likeliest choices, size, and speed at
one row.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...bundle import graph_file, graphs_of
from ...errors import ConfigError
from ...io import Json, Say
from ...runtime import RowRunner, Session, context_of
from ...runtime.sessions.measured_texts import vocabulary
from ...tasks import text_inputs
from .rows import Example

ROUNDS = 3
"""How often each time is measured; the shortest counts."""
_NEW = 32
_SHORT = 8
_LONG = 256
"""Tokens to generate; tokens of the prompts before them; tokens of the prompt for the reading speed."""
_LEAST = 1e-30
"""The probability that replaces 0 for a label."""
_MOST_ANSWERED = 16
_SPARE = 8
_LONGEST = 256
"""Rows to answer at a time; tokens that an answer may exceed the longest expected answer by; the most tokens
of an answer.
"""


@dataclass(frozen=True)
class Figures:
    """The figures of one form; None where the task does not have the figure.

    Args:
        nbytes: the bytes of graphs and their weights, including the slots of adapters.
        perplexity: over the tokens of answers, or of full texts; for a classifier, over the right labels.
        right: the share of rows with the expected answer, exactly or as equal JSON; for a classifier, with
            the right label.
        best: the likeliest choice at each scored position or row.
        decode, prefill: tokens a second of one row: generated, and read from a prompt.
    """

    nbytes: int
    perplexity: float
    right: float | None
    best: np.ndarray
    decode: float | None
    prefill: float

    def agreement(self, other: Figures) -> float:
        """Returns the share of positions at which both have the same likeliest choice."""
        return float((self.best == other.best).mean())


def figures(folder: Path, adapter: str | None, rows: Sequence[Example], say: Say) -> Figures:
    """Measures the bundle at ``folder`` on rows on the CPU, with ``adapter``, or with the adapters folded
    into it.

    Raises:
        ConfigError: a row cannot be answered, or the model's context has no room for any answer.
    """
    session = Session(folder, "cpu", verify="off")
    say("answer")
    found = quality(session, adapter, rows)
    say("speed")
    return Figures(nbytes_of(session), *found, *speed(session, adapter, rows))


def nbytes_of(session: Session) -> int:
    """Returns the bytes of a bundle's graphs and of their weights."""
    parts = graphs_of(session.bundle)
    return sum(path.stat().st_size for part in parts for path in session.folder.glob(f"{graph_file(part)}*"))


class Quality(NamedTuple):
    """The part of :class:`Figures` that does not depend on the machine."""

    perplexity: float
    right: float | None
    best: np.ndarray


def quality(session: Session, adapter: str | None, rows: Sequence[Example]) -> Quality:
    """Runs the rows through a bundle and measures its answers."""
    if not session.task.generates:
        results = _results(session, adapter, rows, 0)
        labels = [str(result.get("label")) for result in results]
        scores = [
            result.get("scores", {}).get(row.expected, 0.0) for result, row in zip(results, rows, strict=True)
        ]
        losses = [-math.log(max(score, _LEAST)) for score in scores]
        right_labels = float(
            np.mean([label == row.expected for label, row in zip(labels, rows, strict=True)])
        )
        return Quality(math.exp(float(np.mean(losses))), right_labels, np.array(labels))
    perplexity, best = _score(session, adapter, rows)
    asked = [row for row in rows if row.expected is not None]
    right = None
    if asked:
        longest = max(len(session.tokenizer.encode(row.expected or "", special=False)) for row in asked)
        answers = [
            str(result["completion"])
            for result in _results(session, adapter, asked, min(longest + _SPARE, _LONGEST))
        ]
        right = float(
            np.mean([same(answer, row.expected or "") for answer, row in zip(answers, asked, strict=True)])
        )
    return Quality(perplexity, right, best)


def speed(session: Session, adapter: str | None, rows: Sequence[Example]) -> tuple[float | None, float]:
    """Returns tokens a second of one row: generated and read; a classifier generates none."""
    return (
        _generating(session, adapter) if session.task.generates else (None, _reading(session, adapter, rows))
    )


def _score(session: Session, adapter: str | None, rows: Sequence[Example]) -> tuple[float, np.ndarray]:
    """Returns the perplexity of the answers' tokens, and the likeliest token at each position."""
    losses, best = [], []
    for row in rows:
        first = max(row.given, 1)
        if len(row.ids) <= first:
            continue
        logits = session.run({"input_ids": np.array([row.ids], np.int64)}, adapter)["logits"][
            0, first - 1 : -1
        ].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        losses.append(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), row.ids[first:]])
        best.append(logits.argmax(-1))
    return math.exp(min(float(np.concatenate(losses).mean()), 700.0)), np.concatenate(best)


def _results(session: Session, adapter: str | None, rows: Sequence[Example], new: int) -> list[Json]:
    """Returns the result of each row: a completion of at most ``new`` tokens, or a label."""
    runner = RowRunner(
        session, () if adapter is None else (adapter,), _MOST_ANSWERED, {"max_new_tokens": new} if new else {}
    )
    results = []
    for start in range(0, len(rows), runner.block):
        for outcome in runner.outcomes(
            (start + number, row.asked) for number, row in enumerate(rows[start : start + runner.block], 1)
        ):
            if outcome.error is not None:
                raise outcome.error
            results.append(outcome.result or {})
    return results


def same(answer: str, expected: str) -> bool:
    """Whether two answers are equal: as text apart from surrounding spaces, or as JSON."""
    if answer.strip() == expected.strip():
        return True
    try:
        return bool(json.loads(answer) == json.loads(expected))
    except (ValueError, RecursionError):
        return False


def _generating(session: Session, adapter: str | None) -> tuple[float, float]:
    """Returns tokens a second of one row: generated, and read."""
    # the rest of the context leaves room for virtual tokens of prompts
    room = (context_of(session) or 4 * _LONG) - _NEW
    if room < 2:
        raise ConfigError(
            "the model's context has no room for an answer", where=session.folder.name, found=room + _NEW
        )
    rng = np.random.default_rng(0)
    words = vocabulary(session.folder)
    short, long = (rng.integers(1, words, min(length, room // 2)).tolist() for length in (_SHORT, _LONG))

    def generate(prompt: list[int], new: int) -> None:
        session.generate([prompt], adapter, max_new_tokens=new, min_new_tokens=new)

    one, many, read = (_seconds(partial(generate, *what)) for what in ((short, 1), (short, _NEW), (long, 1)))
    return (_NEW - 1) / max(many - one, 1e-9), len(long) / read


def _reading(session: Session, adapter: str | None, rows: Sequence[Example]) -> float:
    """Returns tokens a second that the bundle reads, one row at a time."""
    batches = [text_inputs(session, row.asked) for row in rows[:_MOST_ANSWERED]]

    def read() -> None:
        for batch in batches:
            session.run(batch, adapter)

    return sum(batch["input_ids"].size for batch in batches) / _seconds(read)


def _seconds(run: Callable[[], None]) -> float:
    """Returns the shortest time of several calls."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)
