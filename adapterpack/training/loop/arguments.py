"""Builds the trainer's arguments from a configuration, and refuses invalid ones before a model is loaded."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, default_logdir

from ...errors import ConfigError, MissingExtra
from ...extras import needed_by
from ...library_errors import reason
from ..config.fields import TrainConfig, field_names
from ..trainers.kind import TRAINERS, TrainerKind

log = logging.getLogger(__name__)
_OWN = frozenset(
    {"output_dir", "gradient_checkpointing", "report_to", "load_best_model_at_end", "auto_find_batch_size"}
)
"""Settings that are translated instead of being passed on unchanged."""
_OPENED_FIRST = {"mlflow": "mlflow:MlflowClient"}
"""Reporters that open their store only at the first metric, with the class that opens it: a missing store is
then reported before the base is loaded.
"""


def arguments_of(config: TrainConfig, folder: str | Path, targets: tuple[str, ...] = ()) -> TrainingArguments:
    """Returns the trainer's arguments, with ``folder`` as its output.

    ``targets`` are the inputs that evaluation compares outputs with.

    Raises:
        ConfigError: the trainer refuses a setting, or two settings contradict each other.
        MissingExtra: the package of the trainer, or of a reporter, is not installed.
    """
    kind = TRAINERS[config.trainer]
    arguments = class_at(kind.arguments, kind)
    supported = set(field_names(arguments))
    taken = {
        name: _plain(getattr(config, name)) for name in field_names(TrainConfig) if name in supported - _OWN
    }
    if config.trainer_config is not None:
        taken |= {
            name: _plain(getattr(config.trainer_config, name))
            for name in field_names(type(config.trainer_config))
            if name in supported
        }
    # Newer versions of transformers have another name for it. Always set, because TRL's default differs.
    checkpointing = (
        "activation_checkpointing" if "activation_checkpointing" in supported else "gradient_checkpointing"
    )
    taken[checkpointing] = config.gradient_checkpointing
    # Rows of similar length share a batch, which saves padding.
    if config.group_by_length:
        taken["train_sampling_strategy"] = "group_by_length"
    elif not config.shuffle:
        taken["train_sampling_strategy"] = "sequential"
    taken |= _batch(kind, config)
    if config.auto_find_batch_size and kind.compares:
        raise ConfigError(
            f"the trainer {kind.name} compares the rows of a batch, so smaller ones train something else",
            where="auto_find_batch_size",
            remedy="leave it out",
        )
    if config.eval_samples and (kind.rows or config.task != "text-generation"):
        raise ConfigError(
            "answers are shown where a model learns to write them",
            where="eval_samples",
            expected="task: text-generation, and trainer: sft",
            remedy="leave it out",
        )
    _require_evaluation(config)
    if takes_best(config):
        taken |= {
            "load_best_model_at_end": True,
            "save_strategy": config.eval_strategy,
            # Save at each evaluation: only a saved step can be restored as the best.
            "save_steps": config.eval_steps or config.logging_steps,
        }
    try:
        return arguments(
            **taken,
            output_dir=str(folder),
            report_to=_reporters(config),
            run_name=config.pack_name,  # what W&B and MLflow call the run
            disable_tqdm=True,  # one bar is enough: that of adapterpack.train or of the command
            dataloader_pin_memory=torch.cuda.is_available(),
            do_eval=has_evaluation(config),
            use_cpu=not torch.accelerator.is_available(),  # said, because only then bf16 is let pass on a CPU
            remove_unused_columns=False,
            label_names=list(targets) or None,
            logging_nan_inf_filter=False,
        )
    except ValueError as error:
        raise ConfigError(
            f"the trainer refuses a setting: {str(error).partition(chr(10))[0].rstrip('.')}"
        ) from error


def _batch(kind: TrainerKind, config: TrainConfig) -> dict[str, int]:
    """Returns the batch that a trainer needs if the configuration's is smaller: as many rows a step, in fewer
    batches.

    Raises:
        ConfigError: they cannot be.
    """
    rows, least = config.per_device_train_batch_size, kind.least_rows
    steps, rest = divmod(rows * config.gradient_accumulation_steps, least)
    if rows >= least:
        return {}
    if rest:
        raise ConfigError(
            f"the trainer {kind.name} compares the rows of a batch",
            where="per_device_train_batch_size",
            expected=f"at least {least}",
            found=str(rows),
        )
    log.warning(
        "the trainer %s compares the rows of a batch: it takes %d at once, and %d such batches a step",
        kind.name,
        least,
        steps,
    )
    return {"per_device_train_batch_size": least, "gradient_accumulation_steps": steps}


def has_evaluation(config: TrainConfig) -> bool:
    """Whether there are rows to evaluate on."""
    return config.eval_file is not None or config.val_set_size > 0


def class_at(path: str, kind: TrainerKind) -> Any:
    """Returns the class that ``module:class`` names.

    Raises:
        MissingExtra: the package is not installed.
    """
    module, _, name = path.partition(":")
    with needed_by(f"the trainer {kind.name}"):
        return getattr(importlib.import_module(module), name)


def _plain(value: Any) -> Any:
    """Returns a tuple as a list and a mapping as a dictionary, as the arguments expect."""
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value


def takes_best(config: TrainConfig) -> bool:
    """Whether the pack gets the adapter of the best evaluation instead of the last step's."""
    return config.load_best_model_at_end or config.early_stopping_patience is not None


def _require_evaluation(config: TrainConfig) -> None:
    """Raises if a setting needs evaluations and the configuration has none."""
    wanting = [
        name
        for name, wants in (
            ("eval_strategy", config.eval_strategy != "no"),
            ("load_best_model_at_end", config.load_best_model_at_end),
            ("early_stopping_patience", config.early_stopping_patience is not None),
        )
        if wants
    ]
    if wanting and (not has_evaluation(config) or config.eval_strategy == "no"):
        raise ConfigError(
            f"{wanting[0]} needs evaluations",
            expected="eval_file or val_set_size, and eval_strategy: steps or epoch",
            found=f"eval_file {config.eval_file}, eval_strategy {config.eval_strategy}",
        )


def _reporters(config: TrainConfig) -> list[str]:
    """Returns the names of the reporters; raises if one is not installed, or cannot open its store."""
    names = [config.report_to] if isinstance(config.report_to, str) else list(config.report_to)
    available = get_available_reporting_integrations()
    for name in names:
        if name not in {"none", "all", *available}:
            raise MissingExtra(
                "metrics are reported by a package that is not installed",
                where="report_to",
                found=name,
                expected=", ".join(["none", *available]),
                remedy=f"install {name}, or leave report_to out",
            )
        if name in _OPENED_FIRST:
            module, _, opened = _OPENED_FIRST[name].partition(":")
            with _reporting(name):
                getattr(importlib.import_module(module), opened)()
    return names


def set_up_reporters(trainer: Any) -> None:
    """Makes errors in the setup of a trainer's reporters name the reporter, and TensorBoard's files lie in
    ``runs/NAME``, unless ``TENSORBOARD_LOGGING_DIR`` is set: a pack takes no other files.
    """
    names = {callback: name for name, callback in INTEGRATION_TO_CALLBACK.items()}
    for callback in trainer.callback_handler.callbacks:
        if getattr(callback, "logging_dir", "") is None:
            callback.logging_dir = str(Path("runs", trainer.args.run_name, Path(default_logdir()).name))
        if type(callback) in names and hasattr(callback, "setup"):
            callback.setup = _reporting(names[type(callback)])(callback.setup)


@contextmanager
def runs_of_reporters() -> Iterator[None]:
    """Ends the run of W&B that begins inside the block, so that the next adapter gets its own."""
    before = getattr(sys.modules.get("wandb"), "run", None)
    try:
        yield
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not before:
            wandb.finish()


@contextmanager
def _reporting(name: str) -> Iterator[None]:
    """Turns errors in a reporter's setup into an error that names it, because the training itself is not at
    fault.
    """
    try:
        yield
    except Exception as error:
        raise MissingExtra(
            f"metrics cannot be reported by {name}: {reason(error)}",
            where="report_to",
            remedy=f"install or set up what {name} needs for its store, or leave report_to out",
        ) from error
