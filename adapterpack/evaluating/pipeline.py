"""Runs rows of data through a bundle, for the base and for each adapter, and measures the answers: what is
measured is what is served.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..exporting.cached import bundle_for
from ..hub import folder_of
from ..pack import Pack
from ..readable import StepCounter
from ..runtime import start_ids
from ..runtime.providers import Device
from ..runtime.sessions.run import RowRunner
from ..runtime.sessions.session import Session
from ..runtime.text import context_of
from ..tasks import Task
from ..tasks.data import IGNORED, DataReport, Labels, RowError
from ..training.config.sources import Source, sources_of
from ..training.data.decompress import dataset_of
from ..training.data.load import load_rows
from .evaluation import AnsweredRows, EvaluatedModel, EvaluationRow, Result, RowReply, evaluation_of
from .result import Evaluated, figures_of

BASE = "base"
"""The name of the base among the models."""


def evaluate(
    bundle: str | os.PathLike[str],
    packs: Sequence[Pack | str | os.PathLike[str]] = (),
    *,
    data: str | Mapping[str, Any],
    adapters: Sequence[str] | None = None,
    provider: str | Device | None = None,
    batch_size: int = 16,
    rows: int | None = None,
    max_length: int = 1024,
    on_bad_row: str = "fail",
    draws: int = 1000,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Evaluated:
    """Measures adapters on rows with known answers, and the base beside them, by the measures of the task.

    Args:
        bundle: a bundle; or a base, which is exported with ``packs`` as :func:`adapterpack.bundle_for` does.
        packs: adapters, which are loaded into a bundle.
        data: a file in any form that training reads, or a source of data as a training configuration has it
            (``{"path": "tickets.csv", "columns": {"text": "message"}}``).
        adapters: which adapters to measure; by default ``packs``, or else all of the bundle.
        provider: where to run, see :class:`adapterpack.Session`.
        batch_size: how many rows run together.
        rows: how many rows to use: the first, of a folder some from all over it; by default all.
        max_length: the tokens at which texts are cut whose likelihood is measured.
        on_bad_row: ``fail``, or ``skip`` to leave out rows that cannot be read or run.
        draws: how many draws of rows the intervals take.
        progress: called with a message now and then.
        options: with which rows are run: the parameters of generated answers, or the options of the task.

    Returns:
        The figures of each model with their intervals, and every row's answer.

    Raises:
        ConfigError: the data cannot be read, has no answers, or has labels that an adapter does not have; or
            no model can answer.
        UnknownAdapter: the bundle has no such adapter.
        Unsupported: answers of the task are not measured.
        BaseMismatch, ParityError: see :func:`adapterpack.export`.

    Example:
        >>> evaluate("bundle", data="tickets.test.jsonl").measures  # doctest: +SKIP
        {'tickets': {'accuracy': 0.9, 'macro_f1': 0.89}}
    """
    (source,) = sources_of(data, "data")
    report = DataReport(source.path, skips=on_bad_row == "skip", reading=source.reading)
    table = load_rows(replace(source, max_samples=rows or source.max_samples), report)
    say = progress or (lambda text: None)
    checked: list[Any] = []

    def check(task: Task) -> None:
        kind = evaluation_of(task, table.column_names)
        checked[:] = kind, kind.read(table, report)

    folder = bundle_for(bundle, packs, progress=progress, accept=check)
    session = Session(folder, provider)
    loaded = []
    if folder == folder_of(bundle):
        loaded = [session.load(pack) for pack in packs]
    else:
        say(f"{bundle} is exported to {folder}, where the next call finds it")
    if not checked:
        check(session.task)
    evaluation, read_all = checked
    most = min(max_length, context_of(session) or max_length)
    models, missing = _models(session, adapters or loaded or session.adapters, most)
    read: dict[Labels | None, list[EvaluationRow]] = {}
    for name, model in [*models.items()]:
        try:
            read[model.labels] = read.get(model.labels) or read_all(model)
        except ConfigError as error:
            if adapters or len(models) == 1:
                raise
            missing[name] = error.sentence  # a bundle may hold adapters of several sets of labels
            del models[name]
    first, *others = read.values()
    asked = _shared(first, [{row.number for row in some} for some in others], report)
    count = len(models) * sum(len(row.asked) + len(row.scored) for row in asked)
    tick = StepCounter(count, say, "evaluate").tick
    given = {**evaluation.options(session, asked), **options}
    replies = {
        name: _replies(model, asked, evaluation.reduce, given, batch_size, report, tick)
        for name, model in models.items()
    }
    answered = _shared(asked, replies.values(), report)
    kept = {name: [some[row.number] for row in answered] for name, some in replies.items()}
    judged = {
        name: (
            None if model.adapter is None else session.pack(model.adapter).id,
            evaluation.judge(AnsweredRows(answered, kept[name], kept.get(BASE), model)),
        )
        for name, model in models.items()
    }
    return Evaluated(
        source.path,
        session.task.name,
        evaluation.name,
        answered,
        figures_of(judged, len(answered), draws),
        missing,
        [*report.bad.values()],
        _trained_on(source, session, models),
    )


def _trained_on(source: Source, session: Session, models: Mapping[str, EvaluatedModel]) -> list[str]:
    """Returns the adapters that say that they were trained on this data, which is hashed if any says what it
    was trained on.
    """
    said = {
        model.adapter: {one.get("digest") for one in training.get("datasets", ())} - {None}
        for model in models.values()
        if model.adapter and (training := session.pack(model.adapter).manifest.training)
    }
    digest = dataset_of(source)["digest"] if any(said.values()) else None
    return [name for name, digests in said.items() if digest in digests]


def _shared(
    rows: Sequence[EvaluationRow], numbers: Iterable[Container[int]], report: DataReport
) -> list[EvaluationRow]:
    """Returns the rows whose numbers are among those of every model.

    Raises:
        ConfigError: there is none.
    """
    shared = [row for row in rows if all(row.number in some for some in numbers)]
    if not shared:
        raise ConfigError("no row can be measured", where=report, found=next(iter(report.bad.values()), None))
    return shared


def _models(
    session: Session, adapters: Sequence[str], max_length: int
) -> tuple[dict[str, EvaluatedModel], dict[str, str]]:
    """Returns the models to measure, the base first, and those that cannot be measured with the reason.

    Raises:
        UnknownAdapter: the bundle has no such adapter.
        ConfigError: no model has a trained head.
    """
    folded = session.bundle.mode == "folded"
    models = {}
    missing = {}
    task = session.task
    for adapter in [*([] if folded and session.adapters else [None]), *adapters]:
        head = session.head(None if adapter is None else session.pack(adapter))
        name = adapter or BASE
        if (task.heads and not head.trained) or (task.labelled and head.labels is None):
            missing[name] = "it has no trained head for this task"
            continue
        labels = Labels(tuple(head.labels or ()), head.problem) if task.labelled else None
        models[name] = EvaluatedModel(session, adapter, labels, max_length)
    if not models:
        raise ConfigError(
            "neither the base nor an adapter has a trained head for this task",
            where=session.folder,
            found=", ".join(missing),
            remedy="name an adapter that was trained for it",
        )
    return models, missing


def _replies(
    model: EvaluatedModel,
    rows: Sequence[EvaluationRow],
    reduce: Callable[..., Result],
    options: Mapping[str, Any],
    batch_size: int,
    report: DataReport,
    tick: Callable[[], None],
) -> dict[int, RowReply]:
    """Returns row number -> what a model gives for the row, without the rows that it cannot run.

    Raises:
        AdapterpackError: a row cannot be run, and such rows are not skipped.
    """
    runner = RowRunner(model.session, (), batch_size, options)
    asked = [(row, {**one, "adapter": model.adapter}) for row in rows for one in row.asked]
    results: dict[int, list[Any]] = {row.number: [] for row in rows}
    for start in range(0, len(asked), runner.block):
        block = asked[start : start + runner.block]
        numbered = ((number, one) for number, (_, one) in enumerate(block, start + 1))
        for outcome, (row, _) in zip(runner.outcomes(numbered), block, strict=True):
            tick()
            if (error := outcome.error) is None:
                with report.row(row.number - 1):
                    results[row.number].append(reduce(model, row, outcome.result or {}))
                continue
            error = error.moved(row.number, str(row.place)) if isinstance(error, RowError) else error
            if not report.skips:
                raise error
            report.bad[row.number - 1] = str(error)
    replies = {}
    for row in rows:
        with report.row(row.number - 1):
            losses = [_loss(model, one, tick) for one in row.scored]
            if len(results[row.number]) == len(row.asked):
                replies[row.number] = RowReply(results[row.number], losses)
    return replies


def _loss(
    model: EvaluatedModel, encoded: Mapping[str, Sequence[int]], tick: Callable[[], None]
) -> tuple[float, int]:
    """Returns the negative log-likelihood of the learned tokens of an encoded text, and their number."""
    session = model.session
    ids = encoded["input_ids"]
    labels = encoded["labels"]
    if session.task.has_encoder:
        inputs = {"input_ids": ids, "decoder_input_ids": [*start_ids(session)[:1], *labels[:-1]]}
    else:
        inputs = {"input_ids": ids}
        labels = [*labels[1:], IGNORED]
    arrays = {name: np.array([value], np.int64) for name, value in inputs.items()}
    learned = np.flatnonzero(np.array(labels) != IGNORED)
    logits = session.run(arrays, model.adapter)["logits"][0][learned].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    right = logits[np.arange(len(learned)), np.array(labels)[learned]]
    tick()
    return float((np.log(np.exp(logits).sum(-1)) - right).sum()), len(learned)
