"""Config + data -> packs: ``transformers.Trainer`` is the loop, the model stays the Hugging Face class."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import EvalPrediction, TrainingArguments

from ..adapter_methods.core.token_positions import Acts
from ..errors import ConfigError, NothingToDo, Unsupported
from ..hub.resolve import folder_of
from ..io.atomic import refuse_existing
from ..io.hashing import sha256_of
from ..pack.pack import Pack
from ..tasks.task import IGNORED, TASKS, Task, Training, reads_types, task_named
from . import data
from .config.config import TrainConfig, read_config
from .inject import adapt
from .loading import load_tokenizer, loaded
from .save import save
from .trainer import AdapterTrainer

log = logging.getLogger(__name__)

SAMPLES = 256
"""Rows of the training data that an initialisation may look at."""


class Prepared(NamedTuple):
    """What a config says to train: the model, the modules of it that are trained whole, and encoded rows."""

    model: Any
    heads: tuple[str, ...]
    train: list[dict[str, Any]]
    evaluation: list[dict[str, Any]] | None


def train(config: str | os.PathLike[str] | Mapping[str, Any] | TrainConfig, overrides: Iterable[str] = ()) -> list[Pack]:
    """Trains the adapters that ``config`` describes and writes one pack each; returns the packs.

    ``config`` is a YAML file, a mapping or a :class:`TrainConfig`; ``overrides`` are ``key=value`` texts.

    Raises:
        ConfigError: an unknown key, a wrong value, or data of no known form.
        OutputExists: an output folder is taken; found before anything is trained.
        StorageError: a data file or the base is missing; found before anything is trained.
        NonFinite: training diverged.
        NothingToDo: the adapter would act in no row.

    Example:
        >>> train("train.yaml", ["learning_rate=1e-3"])  # doctest: +SKIP
    """
    configs, notes = read_config(config, overrides)
    for note in notes:
        log.info("%s", note)
    for run_config in configs:
        refuse_existing(Path(run_config.output_dir))
        _training(task_named(run_config.task))
        folder_of(run_config.model_name_or_path)
        for source in filter(None, (run_config.train_file, run_config.eval_file)):
            data.require_file(source)
    return [train_one(run_config)[0] for run_config in configs]


def train_one(config: TrainConfig) -> tuple[Pack, Any]:
    """Trains one adapter and writes its pack; returns the pack and the model with the adapter active in it."""
    started = time.perf_counter()
    task = task_named(config.task)
    learned = _training(task)
    refuse_existing(Path(config.output_dir))
    folder = folder_of(config.model_name_or_path)
    tokenizer = load_tokenizer(folder)
    prepared = _prepared(config, task, learned, folder, tokenizer)
    model = prepared.model
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if task.labelled and getattr(model.config, "pad_token_id", padding) is None:
        model.config.pad_token_id = padding  # a decoder that classifies looks for its last real token
    method_config = dataclasses.replace(
        config.method_config, modules_to_save=tuple(dict.fromkeys([*config.method_config.modules_to_save, *prepared.heads]))
    )
    if method_config.acts is not None:
        _require_acting(method_config.acts, prepared.train, config.train_file)
    collator = data.Collator(padding or 0)  # masked, so any id would do
    adapt(model, method_config, config.pack_name, config.seed, map(collator, _samples(prepared.train, config)))
    with tempfile.TemporaryDirectory(prefix="adapterpack-train-") as scratch:
        trainer = AdapterTrainer(
            model=model,
            args=_arguments(config, scratch, prepared.evaluation is not None, learned.targets),
            train_dataset=prepared.train,
            eval_dataset=prepared.evaluation,
            data_collator=collator,
            compute_metrics=None if learned.accuracy is None else partial(_metrics, learned.accuracy),
        )
        if not sys.stderr.isatty():
            trainer.remove_callback(transformers.PrinterCallback)
        result = trainer.train()
        scores = trainer.evaluate() if prepared.evaluation is not None else {}
    metrics = tuple({"name": key.removeprefix("eval_"), "value": float(scores[key]), "dataset": Path(str(config.eval_file)).name,
                     "n": len(prepared.evaluation or ())} for key in ("eval_accuracy", "eval_loss") if key in scores)
    training = {
        "datasets": [_dataset(config.train_file)],
        "objective": task.name,
        "rows": len(prepared.train),
        "steps": int(result.global_step),
        "final_loss": float(result.training_loss),
        "learning_rate": config.learning_rate,
        "seed": config.seed,
        "precision": "bf16" if config.bf16 else "float32",
    }
    pack = save(model, config.output_dir, adapter=config.pack_name, base=folder, name=config.pack_name, training=training, metrics=metrics)
    log.info("trained '%s' in %.1f s", pack.name, time.perf_counter() - started)
    return pack, model


def _dataset(source: str) -> dict[str, str | None]:
    """A data file by name and digest; a hub data set by its name."""
    path = Path(source)
    return {"id": path.name, "revision": None, "digest": f"sha256:{sha256_of(path)}"} if path.is_file() else {
        "id": source, "revision": None, "digest": None}


def _require_acting(acts: Acts, rows: list[dict[str, Any]], where: str) -> None:
    """Checks that an adapter which acts at some positions only has something to learn from; rows without one are counted in the log."""
    acting = 0
    for row in rows:
        ids, labels = np.array([row["input_ids"]]), row.get("labels")
        prompt = np.cumsum(np.array([labels]) != IGNORED, axis=1) == 0 if isinstance(labels, list) else np.ones_like(ids, bool)
        acting += bool(acts.mask(ids, np.ones_like(prompt), prompt, None).any())
    if not acting:
        raise NothingToDo("the adapter acts in no row of the training data", where=where, expected=str(acts)[:80],
                          remedy="put the invocation into the rows, as the tokenizer splits it there, or choose other positions")
    if acting < len(rows):
        log.warning("%s: in %d of %d rows the adapter acts nowhere", where, len(rows) - acting, len(rows))


def _samples(rows: list[dict[str, Any]], config: TrainConfig) -> Iterator[list[dict[str, Any]]]:
    """Batches of the first rows, for an initialisation that looks at data."""
    size = config.per_device_train_batch_size
    return (rows[start : start + size] for start in range(0, min(len(rows), SAMPLES), size))


def _training(task: Task) -> Training:
    if task.training is None:
        raise Unsupported("this task cannot be trained yet", found=task.name,
                          expected=", ".join(name for name, trainable in TASKS.items() if trainable.training is not None))
    return task.training


def _arguments(config: TrainConfig, scratch: str, evaluates: bool, targets: tuple[str, ...]) -> TrainingArguments:
    shared = {f.name for f in dataclasses.fields(TrainingArguments)} & {f.name for f in dataclasses.fields(TrainConfig)}
    taken = {name: getattr(config, name) for name in shared - {"output_dir", "gradient_checkpointing"}}
    if config.gradient_checkpointing:  # the name that newer versions of transformers use
        supported = {f.name for f in dataclasses.fields(TrainingArguments)}
        taken["activation_checkpointing" if "activation_checkpointing" in supported else "gradient_checkpointing"] = True
    if config.group_by_length:  # rows of about one length share a batch, so that little is padding
        taken["train_sampling_strategy"] = "group_by_length"
    try:
        return TrainingArguments(
            **taken,
            output_dir=scratch,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=not sys.stderr.isatty(),
            dataloader_pin_memory=torch.cuda.is_available(),
            do_eval=evaluates,
            use_cpu=not torch.accelerator.is_available(),  # said, because only then bf16 is let pass on a CPU
            remove_unused_columns=False,
            label_names=list(targets),
        )
    except ValueError as error:
        raise ConfigError(f"the trainer refuses a setting: {str(error).partition(chr(10))[0].rstrip('.')}") from error


def _prepared(config: TrainConfig, task: Task, training: Training, folder: Path, tokenizer: Any) -> Prepared:
    rows = data.load_rows(config.train_file)
    labels = data.labels_in(rows, config.train_file) if task.labelled else []
    encoded = training.encode(_chosen(rows, config), tokenizer, config.max_length, config.train_file, labels)
    evaluation = None
    if config.eval_file:
        evaluation = training.encode(data.load_rows(config.eval_file), tokenizer, config.max_length, config.eval_file, labels)
    model, new = loaded(task, folder, labels)
    if not reads_types(model):
        for row in (*encoded, *(evaluation or ())):
            row.pop("token_type_ids", None)
    return Prepared(model, _heads(task, model, new) if task.heads else (), encoded, evaluation)


def _heads(task: Task, model: Any, new: list[str]) -> tuple[str, ...]:
    """The modules that are trained whole: the task's heads, and what the checkpoint does not hold."""
    heads = dict.fromkeys([name for name in task.heads if hasattr(model, name)])
    heads.update(dict.fromkeys(path for path in new if path.partition(".")[0] not in heads))
    return tuple(heads)


def _chosen(rows: Any, config: TrainConfig) -> Any:
    if config.skip_train_samples >= len(rows):
        raise ConfigError("skip_train_samples leaves no rows", where=config.train_file, expected=f"less than {len(rows)}",
                          found=config.skip_train_samples)
    stop = len(rows) if config.max_train_samples is None else min(len(rows), config.skip_train_samples + config.max_train_samples)
    return rows.select(range(config.skip_train_samples, stop))


def _metrics(accuracy: Callable[[Any, Any], float], prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": accuracy(prediction.predictions, prediction.label_ids)}
