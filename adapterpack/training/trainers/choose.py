"""Chooses the trainer for a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ...tasks.task import Task, get_task
from .kind import TRAINERS, TrainerKind

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
