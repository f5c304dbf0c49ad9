"""Writes the first configuration of a training, after a look at the base and at the data."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..adapter_methods import METHODS
from ..errors import AdapterpackError, ConfigError
from ..hub import folder_of
from ..io import output_file, plain_yaml, refuse_existing
from ..readable import things
from ..runtime import context_length
from ..tasks import TASKS, Task, get_task
from ..tasks.data import IGNORED, DataReport, Labels
from ..torch_adapters import load_config, load_tokenizer
from ..torch_adapters.models.load import require_class
from .config.config import read_config
from .config.fields import TrainConfig, field_names
from .config.sources import Source, sources_of
from .data.load import labels_in, load_rows, token_count
from .loop.preparing import reader_of, training_of
from .suggest import DataFacts, suggest
from .trainers.kind import SUPERVISED, TRAINERS, TrainerKind

log = logging.getLogger(__name__)

_LOOKED_AT = 512
"""How many rows are read to learn what the data is."""
_HELD_OUT, _FEW = 0.1, 20
"""The share of rows to evaluate on, and up to how many rows all are needed to learn from."""
_OTHER_PARTS = ("test", "eval", "valid", "validation", "dev")
"""What files of rows to evaluate on have in their names, instead of ``train``."""


class _Reading(NamedTuple):
    """One way to read the data: what it trains, and what it found. ``unread`` counts the columns that it does
    not read.
    """

    kind: TrainerKind
    task: Task
    report: DataReport
    labels: Labels | None
    facts: DataFacts

    @property
    def rank(self) -> tuple[object, ...]:
        """The smaller, the better: few columns left over, no functions that a user has to write, and of
        preferences a loss that holds on to the reference.
        """
        return (
            len(self.report.unread),
            self.kind.rewards,
            self.kind.name != SUPERVISED,
            self.kind.scores,
            not self.kind.reference,
            not self.task.labelled,
        )


def init(
    base: str | os.PathLike[str],
    data: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str] = "train.yaml",
    *,
    method: str = "lora",
    batch_size: int = 8,
) -> dict[str, Any]:
    """Writes a configuration for training an adapter of a base on data, after a look at both.

    The task is the one that reads most columns of the data, of those that the base has a model for. Comments
    say why settings have their values, which are returned. ``data`` may be a source as a configuration has
    it: ``{"path": "tickets.csv", "columns": {"text": "message"}}``.

    Raises:
        OutputExists: ``out`` is taken.
        ConfigError: no task of this base reads such data; the error lists what each needs.
        StorageError: there is no such base or data.
        UnknownName: there is no such method.

    Example:
        >>> init("models/MiniLM", "tickets.jsonl")["task"]  # doctest: +SKIP
        'text-classification'
    """
    refuse_existing(Path(out), "-o FILE")
    METHODS[method]
    folder = folder_of(base)
    config = load_config(folder)
    (source,) = sources_of(data if isinstance(data, Mapping) else os.fspath(data), "data")
    found = _read(folder, config, source)
    text = config.get_text_config().to_dict()
    name = Path(source.path).name.partition(".")[0]
    settings = {
        "model_name_or_path": os.fspath(base),
        "task": found.task.name,
        "trainer": found.kind.name,
        "train_file": source.path,
        **_evaluation(source.path, found.facts.rows),
        "output_dir": f"packs/{name or 'adapter'}",
        "method": method,
        "per_device_train_batch_size": batch_size,
    }
    if source.columns:
        for key in {"train_file", "eval_file"} & settings.keys():
            settings[key] = {"path": settings[key], "columns": dict(source.columns)}
    suggested = suggest(folder, text, found.facts, method, batch_size)
    if "learning_rate" in found.kind.defaults:
        settings["learning_rate"] = found.kind.defaults["learning_rate"]
        suggested.pop("learning_rate", None)
    settings |= {key: one.value for key, one in suggested.items()}
    settings["seed"] = 0
    (checked,), _ = read_config(settings)
    reasons = {key: one.reason for key, one in suggested.items()} | {"task": _describe(found)}
    lines = [f"# adapterpack train {os.fspath(out)}"]
    for key, value in settings.items():
        line = plain_yaml.dumps({key: value}).rstrip()
        lines.append(line if key not in reasons else f"{line}  # {reasons[key]}")
    with output_file(Path(out)) as path:
        path.write_text("\n".join(lines) + "\n", "utf-8")
    return {**settings, "name": checked.pack_name}


def with_suggestions(config: TrainConfig) -> TrainConfig:
    """Returns a configuration in which the settings that it leaves open have the values that
    :func:`~.suggest.suggest` finds for its base, method and data; the log says why.

    Raises:
        ConfigError, StorageError: the data cannot be read.
    """
    folder = folder_of(config.model_name_or_path)
    facts = []
    for source in sources_of(config.train_file, "train_file"):
        report = DataReport(source.path, skips=config.on_bad_row == "skip", reading=source.reading)
        facts.append(_try(config, report, load_rows(source, report), folder).facts)
    rows, tokens, longest = zip(*facts, strict=True)
    suggested = suggest(
        folder,
        load_config(folder).get_text_config().to_dict(),
        DataFacts(sum(rows), sum(tokens), max(longest)),
        config.method,
        config.per_device_train_batch_size * config.gradient_accumulation_steps,
    )
    own = set(field_names(type(config.method_config)))
    kept = {*(config.given or ()), *(own if config.adapter_name_or_path else ())}
    if "learning_rate" in TRAINERS[config.trainer].defaults:
        kept.add("learning_rate")
    left_open = {name: one for name, one in suggested.items() if name not in kept}
    for name, one in left_open.items():
        log.info("suggested %s: %s (%s)", name, one.value, one.reason)
    values = {name: one.value for name, one in left_open.items()}
    return replace(
        config,
        **{name: value for name, value in values.items() if name not in own},
        method_config=replace(
            config.method_config, **{name: value for name, value in values.items() if name in own}
        ),
        origins={**(config.origins or {}), **dict.fromkeys(values, "a suggestion")},
    )


def _describe(found: _Reading) -> str:
    """Returns what was found in the data, for the comment behind the task."""
    parts = [f"{things(found.facts.rows, 'row')} of {found.report.form}"]
    if found.labels is not None:
        names = found.labels.names
        parts.append(
            f"{things(len(names), 'label')}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
        )
    if found.report.unread:
        parts.append(f"not read: {', '.join(found.report.unread)}")
    return "; ".join(parts)


def _evaluation(path: str, rows: int) -> dict[str, Any]:
    """Returns the setting for rows to evaluate on: a file beside the data, or a share of it."""
    name = Path(path).name
    if "train" in name:
        for part in _OTHER_PARTS:
            if (other := Path(path).with_name(name.replace("train", part))).is_file():
                return {"eval_file": str(other)}
    return {"val_set_size": _HELD_OUT} if rows > _FEW else {}


def _read(folder: Path, config: Any, source: Source) -> _Reading:
    """Returns the best way to read the data with this base.

    Raises:
        ConfigError: there is none.
    """
    rows = load_rows(source)
    load = cache(load_tokenizer)
    readings = []
    problems = {}
    for kind, task in _trainable(config, folder):
        report = DataReport(source.path)
        try:
            with _quiet():
                plain = _plain_config(kind, task, source.path, folder)
                readings.append(_try(plain, report, rows, folder, load))
        except AdapterpackError as error:
            if kind.rows is None:
                problems[task.name] = error.expected or error.what
    if not readings:
        raise ConfigError(
            "no task of this base reads such data",
            where=source.path,
            found=f"{', '.join(rows.column_names)}; a base of type {config.model_type}",
            expected="; ".join(f"{task}: {needs}" for task, needs in problems.items()) or None,
            remedy="name the columns: --column text=message --column label=team; or choose another base",
        )
    return min(readings, key=lambda one: one.rank)


def _trainable(config: Any, folder: Path) -> Iterator[tuple[TrainerKind, Task]]:
    """Yields the kinds of training and the tasks that transformers has a model of this base for."""
    for kind in TRAINERS.values():
        for name in kind.tasks or [name for name, task in TASKS.items() if task.training is not None]:
            try:
                require_class(TASKS[name], config, folder)
            except AdapterpackError:
                continue
            yield kind, TASKS[name]


def _plain_config(kind: TrainerKind, task: Task, data: str, folder: Path) -> TrainConfig:
    """Returns a configuration with nothing but a base, data, a task and a trainer."""
    named = {"model_name_or_path": str(folder), "train_file": data, "output_dir": "adapter"}
    (config,), _ = read_config({**named, "task": task.name, "trainer": kind.name})
    return config


def _try(
    config: TrainConfig,
    report: DataReport,
    rows: Any,
    folder: Path,
    load: Callable[[Path], Any] = load_tokenizer,
) -> _Reading:
    """Reads the first rows as a configuration says, with the tokenizer that ``load`` gives.

    Raises:
        AdapterpackError: they cannot be read so.
    """
    kind = TRAINERS[config.trainer]
    task = get_task(config.task)
    some = rows.select(range(min(len(rows), _LOOKED_AT)))
    if kind.rows is not None:
        reader_of(task, config, folder, load)
        kind.rows(some, report)
        return _Reading(kind, task, report, None, DataFacts(len(rows), 0, 0))
    training = training_of(task, kind)
    labels = labels_in(rows, training, report, config.problem_type) if task.labelled else None
    most = context_length(load_config(folder).to_dict(), folder) or 1 << 20
    encoded = training.encode(some, reader_of(task, config, folder, load), most, report, labels)
    if not encoded:
        raise ConfigError("no row can be learned from", where=report)
    learned = sum(map(_count_learned, encoded))
    longest = max(map(token_count, encoded))
    return _Reading(
        kind, task, report, labels, DataFacts(len(rows), learned * len(rows) // len(some), longest)
    )


def _count_learned(row: Any) -> int:
    """Returns how many tokens or labels of an encoded row are learned."""
    labels = row.get("labels")
    return sum(label != IGNORED for label in labels) if isinstance(labels, Sequence) else 1


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what readers say of data that they may not be meant for."""
    logger = logging.getLogger("adapterpack")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
