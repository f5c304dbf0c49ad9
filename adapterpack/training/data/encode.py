"""Reads the data of a training: rows of all sources as token ids, divided into those to train on and those to
evaluate on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets
from pyarrow import ArrowInvalid, ArrowTypeError

from ...errors import ConfigError
from ...readable import things
from ...tasks import Task, TaskTraining
from ...tasks.data import DataReport, Labels, Row
from ...tasks.data.report import table
from ..config.fields import TrainConfig
from ..config.sources import sources_of
from . import load as data

log = logging.getLogger(__name__)

_SHOWN = 5
"""How many unreadable rows the log explains."""


class _Part(NamedTuple):
    """The rows of one source, with the report on what became of them."""

    rows: Any
    report: DataReport


Rows = list[dict[str, Any]]
"""Encoded rows."""


def read(
    config: TrainConfig, task: Task, training: TaskTraining, tokenizer: Any, labels: Labels | None = None
) -> tuple[Rows, Rows | None, Labels | None]:
    """Returns the rows of a configuration as token ids, those to train on and those to evaluate on (None:
    none), and the labels of a task that has labels; logs a table of what became of the rows.

    ``labels`` are those of a head that was trained before, which stay.

    Raises:
        ConfigError: the data has no known form, rows cannot be read, or no row is left.
    """
    parts = _choose(_load(config.train_file, config), config)
    if task.labelled and labels is None:
        rows, report = _label(parts, training)
        labels = data.labels_in(rows, training, report, config.problem_type)
    parts, apart = _divide(parts, config)
    train, evaluation = (
        _encode(some, training, tokenizer, config.max_length, labels) for some in (parts, apart)
    )
    _say(parts, apart)
    if config.drop_duplicates:
        seen = set[bytes]()
        train = [train[number] for number in _distinct(train, seen)]
        evaluation = [evaluation[number] for number in _distinct(evaluation, seen)]
    return train, evaluation if apart else None, labels


def tables(config: TrainConfig, make: Callable[[Any, DataReport], Any]) -> tuple[Any, Any]:
    """Returns the rows of a configuration, converted by ``make``, for a trainer that encodes them itself:
    those to train on and those to evaluate on (None: none). Logs a table of what became of them.

    Raises:
        ConfigError: the data has no known form, rows cannot be read, or no row is left.
    """
    parts, apart = _divide(_choose(_load(config.train_file, config), config), config)
    train, evaluation = (_table(some, make) if some else None for some in (parts, apart))
    _say(parts, apart)
    if config.drop_duplicates:
        seen = set[bytes]()
        train, evaluation = (rows and rows.select(_distinct(rows, seen)) for rows in (train, evaluation))
    return train, evaluation


def _distinct(rows: Iterable[Row], seen: set[bytes]) -> list[int]:
    """Returns the numbers of the rows not ``seen`` before, logs how many were, and adds all of them.

    Raises:
        ConfigError: a row has pictures or sounds, which are read later.
    """
    kept = []
    count = 0
    for number, row in enumerate(rows):
        if any(map(callable, row.values())):
            raise ConfigError("rows with pictures or sounds are not compared", where="drop_duplicates")
        count = number + 1
        key = sha256(repr(sorted(row.items())).encode()).digest()
        if key not in seen:
            kept.append(number)
        seen.add(key)
    if len(kept) < count:
        log.info("left out %s that occurred before", things(count - len(kept), "row"))
    return kept


def _table(parts: Sequence[_Part], make: Callable[[Any, DataReport], Any]) -> Dataset:
    """Returns the converted rows of several sources as one table."""
    tables = []
    for rows, report in parts:
        made = make(rows, report)
        _count_rows(made, report)
        try:
            tables.append(made if isinstance(made, Dataset) else Dataset.from_list(made))
        except (ArrowInvalid, ArrowTypeError) as error:
            raise ConfigError(
                "some rows hold texts and others messages", where=report, remedy="give all of them one form"
            ) from error
    if len({str(table.features) for table in tables}) > 1:
        raise ConfigError(
            "the sources hold rows of different kinds",
            where=", ".join(part.report.source for part in parts),
            found="; ".join(", ".join(table.column_names) for table in tables),
            remedy="give all of them one form",
        )
    return concatenate_datasets(tables)


def _load(sources: Any, config: TrainConfig) -> list[_Part]:
    """Loads the rows of each source."""
    parts = []
    for source in sources_of(sources, "the configuration"):
        reading = replace(source.reading, system_prompt=config.system_prompt, whole=config.train_on_inputs)
        report = DataReport(source.path, skips=config.on_bad_row == "skip", reading=reading)
        parts.append(_Part(data.load_rows(source, report), report))
    return parts


def _encode(
    parts: Sequence[_Part], training: TaskTraining, tokenizer: Any, max_length: int, labels: Labels | None
) -> Rows:
    """Encodes the rows of all parts."""
    every = []
    for rows, report in parts:
        encoded = training.encode(rows, tokenizer, max_length, report, labels)
        _count_rows(encoded, report)
        report.tokens = sum(map(data.token_count, encoded)) or None
        every += encoded
    return every


def _label(parts: Sequence[_Part], training: TaskTraining) -> _Part:
    """Returns the label columns of all parts together."""
    if len(parts) == 1:
        return parts[0]
    columns = [
        rows.select_columns([name for name in rows.column_names if name == data.label_column(rows, training)])
        for rows, _ in parts
    ]
    return _Part(concatenate_datasets(columns), DataReport("all data", parts[0].report.skips))


def _some(parts: Sequence[_Part], numbers: np.ndarray) -> list[_Part]:
    """Returns the rows with these numbers, counted through all parts; drops parts that have none."""
    ends = [0, *accumulate(len(part.rows) for part in parts)]
    some = []
    for (rows, report), (start, stop) in zip(parts, pairwise(ends), strict=True):
        own = [int(number) - start for number in numbers[(numbers >= start) & (numbers < stop)]]
        if own:
            some.append(_Part(rows.select(own), report.of(own)))
    return some


def _choose(parts: list[_Part], config: TrainConfig) -> list[_Part]:
    """Applies ``skip_train_samples`` and ``max_train_samples``."""
    count = sum(len(part.rows) for part in parts)
    skipped = config.skip_train_samples
    if skipped >= count:
        raise ConfigError(
            "skip_train_samples leaves no rows",
            where=parts[0].report,
            expected=f"less than {count}",
            found=skipped,
        )
    if not skipped and config.max_train_samples is None:
        return parts
    return _some(
        parts,
        np.arange(
            skipped,
            count if config.max_train_samples is None else min(count, skipped + config.max_train_samples),
        ),
    )


def _divide(parts: list[_Part], config: TrainConfig) -> tuple[list[_Part], list[_Part]]:
    """Returns the rows to train on and those to evaluate on: from files of their own, or a share or number of
    all rows, drawn with the seed.
    """
    if not config.val_set_size:
        return parts, [] if config.eval_file is None else _load(config.eval_file, config)
    count = sum(len(part.rows) for part in parts)
    size = round(config.val_set_size * count if config.val_set_size < 1 else config.val_set_size)
    if not 0 < size < count:
        raise ConfigError(
            "val_set_size leaves no rows to learn from, or none to evaluate",
            where=parts[0].report,
            expected=f"a share of {count} rows, or less than so many",
            found=config.val_set_size,
        )
    order = np.random.default_rng(config.seed).permutation(count)
    return _some(parts, np.sort(order[size:])), _some(parts, np.sort(order[:size]))


def _count_rows(rows: Any, report: DataReport) -> None:
    """Reports how many rows a source gave; raises if there are none, or if a form was requested but the
    task's data has none to choose.
    """
    if not len(rows):
        raise ConfigError(
            "no row of the data can be learned from",
            where=report,
            found=next(iter(report.bad.values()), None),
        )
    report.rows = len(rows)
    if report.reading.form is not None:
        raise ConfigError(
            "data of this task has no form to choose",
            where=report,
            found=f"form {report.reading.form}",
            remedy="leave it out",
        )


def _say(parts: Sequence[_Part], apart: Sequence[_Part]) -> None:
    """Logs the table of all rows, and the reasons why some could not be read."""
    shown = [
        replace(report, source=f"{report}, {use}") if apart else report
        for use, some in (("train", parts), ("eval", apart))
        for _, report in some
    ]
    # One record per line, so that names in the data cannot forge further records.
    for line in table(shown).splitlines():
        log.info("%s", line)
    for _, report in (*parts, *apart):
        _say_bad(report)


def _say_bad(report: DataReport) -> None:
    """Logs why rows of a source could not be read."""
    if report.bad:
        reasons = list(report.bad.values())
        log.warning("%s: left out %s, which cannot be read", report, things(len(reasons), "row"))
        for reason in reasons[:_SHOWN]:
            log.warning("%s", reason)
        if len(reasons) > _SHOWN:
            log.warning("... and %d more", len(reasons) - _SHOWN)
        # Training and evaluation rows share the report; log it once.
        report.bad.clear()
