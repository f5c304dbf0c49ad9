"""Trains one adapter and writes its pack, in two separate functions, so that several adapters are written
only when all are trained.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import TrainerCallback

from ...hub import folder_of
from ...io import refuse_existing
from ...pack import Pack
from ...tasks import get_task
from ...tasks.data import NUMBER
from ...torch_adapters.models.load import load_for_task
from ...torch_adapters.save import save
from ..config.config import as_mapping, claim
from ..config.fields import TrainConfig
from ..config.sources import sources_of
from ..data.decompress import dataset_of
from ..trainers.kind import TRAINERS
from .arguments import arguments_of, runs_of_reporters, takes_best
from .build_trainer import own_forward, trainer_for
from .out_of_memory import BATCH, in_batches_that_fit, memory_errors
from .preparing import PreparedRun, prepare, reader_of, training_of
from .resuming import Patience, RunFolder, Stopping, interruptible, keep_checkpoint, other_processes
from .rewards import Reward
from .samples import Samples
from .shared_bases import SharedBases
from .steps import Divergence, Step, Steps, evaluation_scores, evaluations_of, losses_of

log = logging.getLogger(__name__)

Shown = Callable[[Step], None]


class TrainedAdapter(NamedTuple):
    """An adapter that is trained but not written yet."""

    config: TrainConfig
    folder: RunFolder
    ready: PreparedRun
    trainer: Any
    training: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    started: float


@in_batches_that_fit
def train_adapter(
    config: TrainConfig, progress: Shown | None, rewards: Sequence[Reward], bases: SharedBases | None = None
) -> TrainedAdapter:
    """Trains one adapter, alone or as one of several over the same ``bases``, from the last checkpoint of the
    same run if there is one; with ``auto_find_batch_size`` in batches that fit into memory.
    """
    started = time.perf_counter()
    kind = TRAINERS[config.trainer]
    task = get_task(config.task)
    refuse_existing(config.output_dir, "output_dir=...", config.overwrite_output_dir)
    base = folder_of(config.model_name_or_path)
    datasets = list(map(dataset_of, sources_of(config.train_file, "train_file")))
    described = {**as_mapping(config), "datasets": datasets}
    # These change no number, so a run may resume with other values.
    described |= dict.fromkeys(("on_divergence", "overwrite_output_dir", "eval_samples"))
    if config.auto_find_batch_size:
        described |= dict.fromkeys(
            BATCH, config.per_device_train_batch_size * config.gradient_accumulation_steps
        )
    run = RunFolder(config.output_dir, described, config.overwrite_output_dir)
    stopping = Stopping()
    arguments = arguments_of(config, run.path, () if kind.rows else training_of(task, kind).targets)
    # Only the process that saves locks the folder; the others just read from it.
    checkpoint = run.begin() if arguments.should_save else run.last()
    with (
        memory_errors(config),
        keep_checkpoint(run, arguments.should_save),
        other_processes(arguments.world_size),
    ):
        reader = reader_of(task, config, base)
        ready = prepare(config, task, base, reader, load_for_task if bases is None else bases.load)
        evaluation = ready.rows.evaluation
        divergence = Divergence(
            config.on_divergence == "fail" and not takes_best(config), _loss_of_nothing(ready)
        )
        steps = Steps(progress, name="" if bases is None else config.pack_name, divergence=divergence)
        if checkpoint is not None:
            log.info("going on from %s", checkpoint)
        callbacks: list[TrainerCallback] = [stopping]
        if config.early_stopping_patience is not None:
            callbacks.append(Patience(config.early_stopping_patience))
        if config.eval_samples and evaluation is not None:
            callbacks.append(Samples(evaluation, reader, config.eval_samples))
        with (
            own_forward(ready.model),
            runs_of_reporters(),
            interruptible(stopping, arguments.world_size == 1 and config.save_strategy != "no"),
            # Several processes would run out at different times.
            memory_errors(config, again=arguments.world_size == 1),
        ):
            trainer = trainer_for(config, ready, arguments, reader, rewards, callbacks=callbacks, steps=steps)
            result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            scores = _scores(trainer) if evaluation is not None else {}
    metrics = tuple(
        {"name": name, "value": value, "dataset": _evaluation_name(config), "n": len(evaluation or ())}
        for name, value in scores.items()
    )
    training = {
        "datasets": datasets,
        "objective": kind.name if kind.rows else task.name,
        "rows": len(ready.rows.train),
        "steps": int(result.global_step),
        "final_loss": steps.recent(trainer.state.logging_steps),
        "learning_rate": config.learning_rate,
        "seed": config.seed,
        "precision": "bf16" if config.bf16 else "fp16" if config.fp16 else "float32",
        "config": claim(config),
        "losses": losses_of(steps.losses),
    }
    if evaluations := evaluations_of(trainer.state.log_history):
        training["evaluations"] = evaluations
    return TrainedAdapter(config, run, ready, trainer, training, metrics, started)


def write_pack(done: TrainedAdapter) -> Pack:
    """Writes the pack of a trained adapter in the first of several processes, then removes the run's
    checkpoints.
    """
    config, ready = done.config, done.ready
    first = done.trainer.is_world_process_zero()
    with memory_errors(config), keep_checkpoint(done.folder, first):
        pack = save(
            ready.model,
            config.output_dir if first else None,
            adapter=config.pack_name,
            base=folder_of(config.model_name_or_path),
            name=config.pack_name,
            training=done.training,
            metrics=done.metrics,
            chat_template=ready.chat_template,
            # Every process calls ``save``, because gathering sharded parameters needs them all.
            parents=() if ready.started is None else (ready.started,),
            replace=config.overwrite_output_dir,
        )
    if first:
        done.folder.end()
    done.trainer.accelerator.wait_for_everyone()
    log.info("trained '%s' in %.1f s", pack.name, time.perf_counter() - done.started)
    return pack


def _scores(trainer: Any) -> Mapping[str, float]:
    """Returns the metrics of the trained adapter: those of an evaluation after the last step, or of a new one
    if the adapter is an earlier step's.
    """
    if trainer.args.load_best_model_at_end:
        return evaluation_scores(trainer.evaluate())
    last = (
        entry for entry in reversed(trainer.state.log_history) if entry["step"] == trainer.state.global_step
    )
    return next(filter(None, map(evaluation_scores, last)), None) or evaluation_scores(trainer.evaluate())


def _loss_of_nothing(ready: PreparedRun) -> float:
    """Returns the loss of a model that always predicts zero, for numeric labels, whose losses can have any
    scale; 0 for losses in nats.
    """
    if ready.rows.labels is None or ready.rows.labels.problem is not NUMBER or ready.rows.collator is None:
        return 0.0
    return float(np.mean([float(row["labels"]) ** 2 for row in ready.rows.train]))


def _evaluation_name(config: TrainConfig) -> str:
    """Returns the name of the rows that a run evaluates on."""
    source = config.train_file if config.eval_file is None else config.eval_file
    return ", ".join(Path(one.path).name for one in sources_of(source, "eval_file"))
