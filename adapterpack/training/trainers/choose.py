"""Chooses the kind of training that settings mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ...tasks.task import Task, get_task
from .kind import TRAINERS, TrainerKind

SUPERVISED = "sft"


def trainer_of(values: Mapping[str, Any]) -> TrainerKind:
    """The kind of training that settings name, or by their task: one that is there for a task with no
    training of its own.

    Raises:
        UnknownName: they name none that there is.

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
    """Checks that a kind of training is one for the task.

    Raises:
        ConfigError: it is for others.
    """
    if kind.tasks and task.name not in kind.tasks:
        raise ConfigError(
            f"the trainer {kind.name} does not train this task",
            where="task",
            expected=", ".join(kind.tasks),
            found=task.name,
            remedy="leave the task out, or choose another trainer",
        )
