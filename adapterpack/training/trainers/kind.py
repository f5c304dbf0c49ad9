"""Defines what a kind of training is, and registers the kinds by name, which the files of this folder add.

Another package can add a kind by an entry point of the group ``adapterpack.trainers``. Trainer classes are
given by name and imported only when one is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import ConfigError
from ...registry import Registry
from ...tasks import Task, TaskTraining, get_task
from ...tasks.data import DataReport
from .prompt_lengths import CutPrompts


@dataclass(frozen=True)
class NoTrainerSettings:
    """The settings of a kind without any of its own."""


@dataclass(frozen=True, eq=False)
class TrainerKind:
    """One kind of training.

    Args:
        name: the name, as in TRL and other tools.
        trainer: ``module:class`` of the trainer, which is transformers' or derived from it.
        arguments: ``module:class`` of its arguments.
        tasks: the tasks that it trains, the default first; empty for every task that defines its training.
        rows: converts a table and its report to the trainer's rows, if the trainer encodes them itself; None
            if the task encodes them.
        config: the class of its own settings, named as in its arguments.
        defaults: other defaults for settings of a run.
        reference: whether its loss compares with the adapter's starting point, which it takes as
            ``ref_model``.
        rewards: whether it learns from functions that score answers, which it takes as ``reward_funcs``.
        scores: whether its models output a single number, a score.
        reading: how rows are read, if not as the task reads them.
        least_rows: how many rows a batch needs at least.
        compares: whether its loss compares the rows of a batch.
        settings: whether its own settings are passed to the trainer as ``settings`` instead of to its
            arguments.
        cut_prompts: how its prompts keep their last tokens, if it has :class:`.prompt_lengths.PromptLength`.
    """

    name: str
    trainer: str
    arguments: str
    tasks: tuple[str, ...] = ()
    rows: Callable[[Any, DataReport], Any] | None = None
    config: type[Any] = NoTrainerSettings
    defaults: Mapping[str, Any] = field(default_factory=dict)
    reference: bool = False
    rewards: bool = False
    scores: bool = False
    reading: TaskTraining | None = None
    least_rows: int = 1
    compares: bool = False
    settings: bool = False
    cut_prompts: CutPrompts | None = None


TRAINERS: Registry[TrainerKind] = Registry("trainer", TrainerKind, "adapterpack.trainers", __package__)
"""The kinds of training by name."""


SUPERVISED = "sft"


def trainer_of(values: Mapping[str, Any]) -> TrainerKind:
    """Returns the trainer that settings name, or the one for their task: the only trainer for a task without
    its own training, else supervised training.

    Raises:
        UnknownName: they name an unknown trainer.

    Example:
        >>> trainer_of({"trainer": "dpo"}).tasks, trainer_of({}).name
        (('text-generation',), 'sft')
    """
    if (name := values.get("trainer")) is not None:
        return TRAINERS[str(name).lower()]
    task = None if values.get("task") is None else get_task(str(values["task"]))
    only = (
        []
        if task is None or task.training is not None
        else [kind for kind in TRAINERS.values() if task.name in kind.tasks]
    )
    return only[0] if only else TRAINERS[SUPERVISED]


def require_task(kind: TrainerKind, task: Task) -> None:
    """Raises unless a trainer can train the task.

    Raises:
        ConfigError: it trains other tasks only.
    """
    if kind.tasks and task.name not in kind.tasks:
        raise ConfigError(
            f"the trainer {kind.name} does not train this task",
            where="task",
            expected=", ".join(kind.tasks),
            found=task.name,
            remedy="leave the task out, or choose another trainer",
        )
