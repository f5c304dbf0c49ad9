"""Config + data -> packs: ``transformers.Trainer`` is the loop, the model stays the Hugging Face class."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import EvalPrediction

from ..hub.resolve import folder_of
from ..io import strict_json
from ..io.atomic import refuse_existing
from ..io.hashing import sha256_of
from ..pack.pack import Pack
from ..tasks.task import task_named
from .config.config import as_mapping, claimed, read_config
from .config.fields import TrainConfig
from .config.sources import Source, sources_of
from .loading import load_tokenizer
from .loop.arguments import arguments_of
from .loop.memory import memory_errors
from .loop.preparing import prepared, training_of
from .loop.resuming import Patience, RunFolder, Stopping, interruptible, kept
from .loop.steps import Step, Steps, evaluated
from .loop.trainer import AdapterTrainer
from .rows.readable_files import files_of
from .save import save

log = logging.getLogger(__name__)


Shown = Callable[[Step], None]


def train(
    config: str | os.PathLike[str] | Mapping[str, Any] | TrainConfig, overrides: Iterable[str] = (), progress: Shown | None = None
) -> list[Pack]:
    """Trains the adapters that ``config`` describes and writes one pack each; returns the packs.

    While a run lasts its checkpoints are in ``OUTPUT_DIR.checkpoints``; the same call goes on from the last one after an interrupt or a
    crash, to the same pack. Under ``torchrun`` or ``accelerate launch`` the first process writes; the packs of the others are in memory
    alone.

    Args:
        config: a YAML file, a mapping or a :class:`TrainConfig`.
        overrides: ``key=value`` texts.
        progress: called after each step with how far the training is.

    Raises:
        ConfigError: an unknown key, a wrong value, or data of no known form.
        OutputExists: an output folder is taken, or checkpoints of another run lie beside it; found before anything is trained.
        StorageError: a data file or the base is missing; found before anything is trained.
        NonFinite: training diverged.
        NothingToDo: the adapter would act in no row.

    Example:
        >>> train("train.yaml", ["learning_rate=1e-3"])  # doctest: +SKIP
    """
    return [train_one(run_config, progress)[0] for run_config in checked_configs(config, overrides)]


def checked_configs(config: str | os.PathLike[str] | Mapping[str, Any] | TrainConfig, overrides: Iterable[str] = ()) -> list[TrainConfig]:
    """The configurations of a run's adapters, after all that can be checked before a model is loaded.

    Raises:
        ConfigError, OutputExists, StorageError: see :func:`train`.
    """
    configs, notes = read_config(config, overrides)
    for note in notes:
        log.info("%s", note)
    for run_config in configs:
        refuse_existing(Path(run_config.output_dir))
        training_of(task_named(run_config.task))
        arguments_of(run_config, run_config.output_dir)
        folder_of(run_config.model_name_or_path)
        for source in filter(None, (run_config.train_file, run_config.eval_file)):
            for one in sources_of(source, "the configuration"):
                files_of(one)
    return configs


def train_one(config: TrainConfig, progress: Shown | None = None) -> tuple[Pack, Any]:
    """Trains one adapter and writes its pack; returns the pack and the model with the adapter active in it."""
    started = time.perf_counter()
    task = task_named(config.task)
    learned = training_of(task)
    refuse_existing(Path(config.output_dir))
    base, datasets = folder_of(config.model_name_or_path), list(map(_dataset, sources_of(config.train_file, "train_file")))
    run, steps, stopping = RunFolder(config.output_dir, {**as_mapping(config), "datasets": datasets}), Steps(progress), Stopping()
    arguments = arguments_of(config, run.path, learned.targets)
    checkpoint = run.begin() if arguments.should_save else run.last()
    with memory_errors(config), kept(run):
        model, rows, evaluation, collator, compare = prepared(config, task, base, load_tokenizer(base))
        trainer = AdapterTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=evaluation,
            data_collator=collator,
            compute_metrics=None if compare is None else partial(_metrics, compare),
            callbacks=[stopping, *_stopping_early(config)],
            steps=steps,
        )
        if checkpoint is not None:
            log.info("going on from %s", checkpoint)
        with interruptible(stopping, arguments.world_size == 1 and config.save_strategy != "no"):
            result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        scores = trainer.evaluate() if evaluation is not None else {}
        metrics = tuple({"name": name, "value": value, "dataset": _evaluated_on(config), "n": len(evaluation or ())}
                        for name, value in evaluated(scores).items())
        training = {
            "datasets": datasets,
            "objective": task.name,
            "rows": len(rows),
            "steps": int(result.global_step),
            "final_loss": steps.recent(config.logging_steps),
            "learning_rate": config.learning_rate,
            "seed": config.seed,
            "precision": "bf16" if config.bf16 else "float32",
            "config": claimed(config),
        }
        first = trainer.is_world_process_zero()
        pack = save(model, config.output_dir if first else None, adapter=config.pack_name, base=base, name=config.pack_name,
                    training=training, metrics=metrics)  # by all processes, as what is sharded is gathered
    if first:
        run.end()
    trainer.accelerator.wait_for_everyone()
    log.info("trained '%s' in %.1f s", pack.name, time.perf_counter() - started)
    return pack, model


def _stopping_early(config: TrainConfig) -> list[Patience]:
    return [] if config.early_stopping_patience is None else [Patience(config.early_stopping_patience)]


def _dataset(source: Source) -> dict[str, str | None]:
    """A source by name and digest, of several files that of their names and digests; a hub data set by its name and revision."""
    files = files_of(source)
    if not files and Path(source.path).is_dir():
        files = sorted(path for path in Path(source.path).rglob("*") if path.is_file())
    if not files:
        return {"id": source.path, "revision": source.revision, "digest": None}
    digests = [[path.name, sha256_of(path)] for path in files]
    digest = digests[0][1] if len(files) == 1 else hashlib.sha256(strict_json.canonical(digests)).hexdigest()
    return {"id": Path(source.path).name, "revision": None, "digest": f"sha256:{digest}"}


def _evaluated_on(config: TrainConfig) -> str:
    """The name of the rows that a run is evaluated on."""
    source = config.train_file if config.eval_file is None else config.eval_file
    return ", ".join(Path(one.path).name for one in sources_of(source, "eval_file"))


def _metrics(compare: Callable[[Any, Any], Mapping[str, float]], prediction: EvalPrediction) -> dict[str, float]:
    return dict(compare(prediction.predictions, prediction.label_ids))
