"""What a kind of training is, and the kinds by name: a file of this folder registers the one that it defines.

Another package brings a kind by an entry point of the group ``adapterpack.trainers``. Nothing here imports a
trainer before one is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...registry import Registry
from ...tasks.data.report import DataReport
from ...tasks.task import TaskTraining


@dataclass(frozen=True)
class NoSettings:
    """The settings of a kind that has none of its own."""


@dataclass(frozen=True, eq=False)
class TrainerKind:
    """One kind of training.

    Args:
        name: as TRL and other tools call it.
        trainer: ``module:class`` of the trainer, one of transformers' or derived from it.
        arguments: ``module:class`` of its arguments.
        tasks: the tasks that it trains, the usual one first; none: every task that says how it is trained.
        rows: what makes the trainer's rows of a table and its report, where the trainer encodes them itself;
            None: the task does.
        config: the class of its own settings, under the names that the arguments have for them.
        defaults: settings of a run that have another default here.
        reference: it compares with what the adapter began as, a model that it takes as ``ref_model``.
        rewards: it learns from functions that score answers, which it takes as ``reward_funcs``.
        scores: its models give one number, a score.
        reading: how rows are read, where not as the task does.
        settings: its own settings are its trainer's, which takes them as ``settings``, and not its
            arguments'.
    """

    name: str
    trainer: str
    arguments: str
    tasks: tuple[str, ...] = ()
    rows: Callable[[Any, DataReport], Any] | None = None
    config: type[Any] = NoSettings
    defaults: Mapping[str, Any] = field(default_factory=dict)
    reference: bool = False
    rewards: bool = False
    scores: bool = False
    reading: TaskTraining | None = None
    settings: bool = False


TRAINERS: Registry[TrainerKind] = Registry(
    "kind of training", TrainerKind, "adapterpack.trainers", __package__
)
"""Name -> the kind."""
