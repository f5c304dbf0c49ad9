"""Config + data -> packs: ``transformers.Trainer`` is the loop, the model stays the Hugging Face class."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..hub.resolve import folder_of
from ..io import strict_json
from ..io.atomic import refuse_existing
from ..io.hashing import sha256_of
from ..pack.pack import Pack
from ..tasks.task import task_named
from .config.config import as_mapping, claimed, read_config
from .config.fields import TrainConfig
from .config.sources import Source, sources_of
from .loop.arguments import arguments_of
from .loop.making import own_forward, trainer_for
from .loop.memory import memory_errors
from .loop.preparing import prepared, reader_of, training_of
from .loop.resuming import Patience, RunFolder, Stopping, interruptible, kept
from .loop.rewards import Reward, require_rewards
from .loop.steps import Step, Steps, evaluated
from .rows.readable_files import files_of
from .save import save
from .trainers.choose import require_task
from .trainers.kind import TRAINERS

log = logging.getLogger(__name__)


Shown = Callable[[Step], None]


def train(
    config: str | os.PathLike[str] | Mapping[str, Any] | TrainConfig, overrides: Iterable[str] = (), progress: Shown | None = None,
    rewards: Sequence[Reward] = (),
) -> list[Pack]:
    """Trains the adapters that ``config`` describes and writes one pack each; returns the packs.

    While a run lasts its checkpoints are in ``OUTPUT_DIR.checkpoints``; the same call goes on from the last one after an interrupt or a
    crash, to the same pack. Under ``torchrun`` or ``accelerate launch`` the first process writes; the packs of the others are in memory
    alone.

    Args:
        config: a YAML file, a mapping or a :class:`TrainConfig`.
        overrides: ``key=value`` texts.
        progress: called after each step with how far the training is.
        rewards: functions that score answers, for ``trainer: grpo``: of ``completions``, ``prompts`` and the rows' other columns.

    Raises:
        ConfigError: an unknown key, a wrong value, or data of no known form.
        OutputExists: an output folder is taken, or checkpoints of another run lie beside it; found before anything is trained.
        StorageError: a data file or the base is missing; found before anything is trained.
        NonFinite: training diverged.
        NothingToDo: the adapter would act in no row.

    Example:
        >>> train("train.yaml", ["learning_rate=1e-3"])  # doctest: +SKIP
    """
    return [train_one(run_config, progress, rewards)[0] for run_config in checked_configs(config, overrides, rewards)]


def checked_configs(
    config: str | os.PathLike[str] | Mapping[str, Any] | TrainConfig, overrides: Iterable[str] = (), rewards: Sequence[Reward] = ()
) -> list[TrainConfig]:
    """The configurations of a run's adapters, after all that can be checked before a model is loaded.

    Raises:
        ConfigError, OutputExists, StorageError: see :func:`train`.
    """
    configs, notes = read_config(config, overrides)
    for note in notes:
        log.info("%s", note)
    for run_config in configs:
        refuse_existing(Path(run_config.output_dir))
        require_trainable(run_config, rewards)
        arguments_of(run_config, run_config.output_dir)
        folder_of(run_config.model_name_or_path)
        for source in filter(None, (run_config.train_file, run_config.eval_file)):
            for one in sources_of(source, "the configuration"):
                files_of(one)
    return configs


def require_trainable(config: TrainConfig, rewards: Sequence[Reward]) -> None:
    """Checks that the task can be trained, and in the way that the configuration names.

    Raises:
        ConfigError, Unsupported: it cannot.
    """
    kind, task = TRAINERS[config.trainer], task_named(config.task)
    require_task(kind, task)
    require_rewards(kind, rewards)
    if not kind.rows:
        training_of(task, kind)
    elif config.group_by_length:
        raise ConfigError(f"the trainer {kind.name} cannot group rows by their length", where="group_by_length", remedy="leave it out")


def train_one(config: TrainConfig, progress: Shown | None = None, rewards: Sequence[Reward] = ()) -> tuple[Pack, Any]:
    """Trains one adapter and writes its pack; returns the pack and the model with the adapter active in it."""
    started = time.perf_counter()
    kind, task = TRAINERS[config.trainer], task_named(config.task)
    refuse_existing(Path(config.output_dir))
    base, datasets = folder_of(config.model_name_or_path), list(map(_dataset, sources_of(config.train_file, "train_file")))
    run, steps, stopping = RunFolder(config.output_dir, {**as_mapping(config), "datasets": datasets}), Steps(progress), Stopping()
    arguments = arguments_of(config, run.path, () if kind.rows else training_of(task, kind).targets)
    checkpoint = run.begin() if arguments.should_save else run.last()
    with memory_errors(config), kept(run):
        reader = reader_of(task, kind, base)
        ready = prepared(config, task, base, reader)
        model, evaluation = ready.model, ready.rows.evaluation
        if checkpoint is not None:
            log.info("going on from %s", checkpoint)
        with own_forward(model), interruptible(stopping, arguments.world_size == 1 and config.save_strategy != "no"):
            trainer = trainer_for(config, ready, arguments, reader, rewards, callbacks=[stopping, *_stopping_early(config)], steps=steps)
            result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            scores = trainer.evaluate() if evaluation is not None else {}
        metrics = tuple({"name": name, "value": value, "dataset": _evaluated_on(config), "n": len(evaluation or ())}
                        for name, value in evaluated(scores).items())
        training = {
            "datasets": datasets,
            "objective": kind.name if kind.rows else task.name,
            "rows": len(ready.rows.train),
            "steps": int(result.global_step),
            "final_loss": steps.recent(config.logging_steps),
            "learning_rate": config.learning_rate,
            "seed": config.seed,
            "precision": "bf16" if config.bf16 else "float32",
            "config": claimed(config),
        }
        first = trainer.is_world_process_zero()
        pack = save(model, config.output_dir if first else None, adapter=config.pack_name, base=base, name=config.pack_name,
                    training=training, metrics=metrics,
                    parents=() if ready.started is None else (ready.started,))  # by all processes, as what is sharded is gathered
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


