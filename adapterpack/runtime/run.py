"""Inference from the terminal: rows in, rows out, an adapter for each row."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError
from .session import Session

Row = Mapping[str, Any]

_ASKED = ("messages", "prompt", "text")
"""What a row may ask, the first that it has."""


def run(
    bundle: str | os.PathLike[str],
    rows: Iterable[Row],
    *,
    adapters: Sequence[str] = (),
    provider: str | None = None,
    batch_size: int = 16,
    **sampling: Any,
) -> Iterator[dict[str, Any]]:
    """Runs rows through a bundle and yields one result for each, in order.

    A row is a mapping with ``text``, ``prompt`` or ``messages``, and an optional ``adapter`` (null: the base). Rows that name none are
    run with each of ``adapters`` in turn; if there are none, with the base, or with what is folded into the bundle.

    Raises:
        ConfigError: a row of no known form, or sampling parameters that do not exist or that this task does not have.
        UnknownAdapter: a name that the bundle does not hold; found before the row is run.

    Example:
        >>> list(run("bundle", [{"text": "hi", "adapter": "tickets"}]))  # doctest: +SKIP
        [{'text': 'hi', 'adapter': 'tickets', 'pack': 'sha256:...', 'label': 'product', 'scores': {...}}]
    """
    if batch_size < 1:
        raise ConfigError("batch_size must be at least 1", found=batch_size)
    session = Session(bundle, provider)
    if sampling and session.bundle.task not in SAMPLED:
        raise ConfigError("this bundle does not generate text, so it takes no sampling parameters", found=", ".join(sampling),
                          where=session.bundle.task)
    for name in adapters:
        session.bundle_adapter(name)
    batch: list[Row] = []
    for row in _expanded(rows, adapters or [session.default]):
        batch.append(row)
        if len(batch) == batch_size:
            yield from _run_batch(session, batch, sampling)
            batch = []
    if batch:
        yield from _run_batch(session, batch, sampling)


def _expanded(rows: Iterable[Row], adapters: Sequence[str | None]) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise ConfigError("a row is a mapping with text, prompt or messages", where=f"row {number}", found=type(row).__name__)
        if not any(isinstance(row.get(key), str | list) for key in _ASKED):
            raise ConfigError("a row needs text, prompt or messages", where=f"row {number}",
                              found=", ".join(map(str, row)) or "an empty row")
        if "adapter" in row:
            yield row
        else:
            yield from ({**row, "adapter": name} for name in adapters)


def _run_batch(session: Session, rows: list[Row], sampling: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    names = session.names([row["adapter"] for row in rows], len(rows))
    answer = ANSWERS.get(session.bundle.task, _features)
    for row, name, found in zip(rows, names, answer(session, rows, names, sampling), strict=True):
        yield {**row, "adapter": name, "pack": None if name is None else session.packs[name].id, **found}


def _generated(session: Session, rows: list[Row], names: list[str | None], sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
    prompts = [next(row[key] for key in _ASKED if isinstance(row.get(key), str | list)) for row in rows]
    return [{"completion": g.text, "finish_reason": g.finish_reason, "prompt_tokens": g.prompt_tokens, "completion_tokens": len(g.ids)}
            for g in session.generate(prompts, names, **sampling)]


def _classified(session: Session, rows: list[Row], names: list[str | None], sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
    logits = session.run(session.encode([_text(row) for row in rows]), names)["logits"]
    results: list[dict[str, Any]] = []
    for name, row in zip(names, logits, strict=True):
        labels, own = session.labels(name), name is not None and session.packs[name].manifest.task.labels
        if labels is None or not (own or session.bundle.base_head_trained):
            results.append({"label": None, "note": "the base has no trained head for this task"})
            continue
        scores = np.exp(row[: len(labels)] - row[: len(labels)].max())
        scores /= scores.sum()
        results.append({"label": labels[int(scores.argmax())],
                        "scores": {label: round(float(score), 6) for label, score in zip(labels, scores, strict=True)}})
    return results


def _features(session: Session, rows: list[Row], names: list[str | None], sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
    inputs = session.encode([_text(row) for row in rows])
    hidden = next(iter(session.run(inputs, names).values()))
    mask = inputs["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return [{"embedding": [float(value) for value in row]} for row in mean]


def _text(row: Row) -> str:
    text = row.get("text", row.get("prompt"))
    if not isinstance(text, str):
        raise ConfigError("a row of this task needs text", found=", ".join(map(str, row)))
    return text


ANSWERS: dict[str, Callable[[Session, list[Row], list[str | None], Mapping[str, Any]], list[dict[str, Any]]]] = {
    "text-generation": _generated,
    "text-classification": _classified,
}
"""Task -> what a row's result is made of; other tasks give the mean of the hidden states."""

SAMPLED = frozenset({"text-generation"})
"""Tasks that take sampling parameters."""
