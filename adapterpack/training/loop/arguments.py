"""Makes the trainer's arguments of a configuration; what cannot be is refused before a model is loaded."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ...errors import ConfigError, MissingExtra
from ...extras import needed_by
from ...library_errors import reason
from ..config.fields import TrainConfig
from ..trainers.kind import TRAINERS, TrainerKind

_OWN = frozenset({"output_dir", "gradient_checkpointing", "report_to", "load_best_model_at_end"})
"""Settings that are not passed on as they are."""
_OPENED_FIRST = {"mlflow": "mlflow:MlflowClient"}
"""Reporters that can do without their store until the first metric -> what opens it, so that it is missed
before a base is loaded.
"""


def arguments_of(config: TrainConfig, folder: str | Path, targets: tuple[str, ...] = ()) -> TrainingArguments:
    """What the trainer takes; it writes into ``folder``. ``targets`` are the inputs that outputs are compared
    with.

    Raises:
        ConfigError: it refuses a setting, or two settings do not go together.
        MissingExtra: the trainer is of a package that is not installed, or metrics are to be reported by one.
    """
    kind = TRAINERS[config.trainer]
    arguments = class_at(kind.arguments, kind)
    supported = {f.name for f in dataclasses.fields(arguments)}
    taken: dict[str, Any] = {
        f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig) if f.name in supported - _OWN
    }
    if config.trainer_config is not None:
        taken |= {
            f.name: _plain(getattr(config.trainer_config, f.name))
            for f in dataclasses.fields(config.trainer_config)
            if f.name in supported
        }
    # the name that newer versions of transformers use; said in either case, as TRL's default is another
    checkpointing = (
        "activation_checkpointing" if "activation_checkpointing" in supported else "gradient_checkpointing"
    )
    taken[checkpointing] = config.gradient_checkpointing
    if config.group_by_length:  # rows of about one length share a batch, so that little is padding
        taken["train_sampling_strategy"] = "group_by_length"
    _require_evaluation(config)
    if takes_best(config):
        taken |= {
            "load_best_model_at_end": True,
            "save_strategy": config.eval_strategy,
            # what was evaluated is what can be gone back to
            "save_steps": config.eval_steps or config.logging_steps,
        }
    try:
        return arguments(
            **taken,
            output_dir=str(folder),
            report_to=_reporters(config),
            # its bar also prints what the log says
            disable_tqdm=not sys.stderr.isatty() or bool(os.environ.get("TQDM_DISABLE")),
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


def has_evaluation(config: TrainConfig) -> bool:
    """Whether there are rows to evaluate on."""
    return config.eval_file is not None or config.val_set_size > 0


def class_at(path: str, kind: TrainerKind) -> Any:
    """The class that ``module:class`` names.

    Raises:
        MissingExtra: its package is not installed.
    """
    module, _, name = path.partition(":")
    with needed_by(f"the trainer {kind.name}"):
        return getattr(importlib.import_module(module), name)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def takes_best(config: TrainConfig) -> bool:
    """Whether the best evaluation is packed instead of the last step."""
    return config.load_best_model_at_end or config.early_stopping_patience is not None


def _require_evaluation(config: TrainConfig) -> None:
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


def name_errors_of_reporters(trainer: Any) -> None:
    """Lets what goes wrong where a trainer's reporters begin be an error that names them."""
    names = {callback: name for name, callback in INTEGRATION_TO_CALLBACK.items()}
    for callback in trainer.callback_handler.callbacks:
        if type(callback) in names and hasattr(callback, "setup"):
            callback.setup = _reporting(names[type(callback)])(callback.setup)


@contextmanager
def _reporting(name: str) -> Iterator[None]:
    """Turns what a reporter raises where it begins into a named error: it is no fault of the training."""
    try:
        yield
    except Exception as error:
        raise MissingExtra(
            f"metrics cannot be reported by {name}: {reason(error)}",
            where="report_to",
            remedy=f"install or set up what {name} needs for its store, or leave report_to out",
        ) from error
