"""Config + data -> packs: ``transformers.Trainer`` is the loop, the model stays the Hugging Face class."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..errors import ConfigError
from ..hub.resolve import folder_of
from ..io.atomic import refuse_existing
from ..pack.pack import Pack
from ..tasks.task import get_task
from .config.config import read_config
from .config.fields import TrainConfig
from .config.sources import sources_of
from .data.decompress import files_of
from .loop.arguments import arguments_of
from .loop.continue_training import with_settings_of_the_pack
from .loop.preparing import training_of
from .loop.rewards import Reward, require_rewards
from .loop.run import Shown, TrainedAdapter, train_adapter, write_pack
from .loop.shared_bases import SharedBases
from .trainers.choose import require_task
from .trainers.kind import TRAINERS

log = logging.getLogger(__name__)


def train(
    config: str | os.PathLike[str] | Mapping[str, Any] | TrainConfig,
    overrides: Iterable[str] = (),
    progress: Shown | None = None,
    rewards: Sequence[Reward] = (),
) -> list[Pack]:
    """Trains the adapters that ``config`` describes, and writes a pack for each.

    Several adapters of one base are trained one after the other over one base in memory, each to the pack
    that it would be alone, and packed when all are trained. While a run lasts its checkpoints are in
    ``OUTPUT_DIR.checkpoints``; the same call goes on from the last one after an interrupt or a crash, to the
    same pack. Under ``torchrun`` or ``accelerate launch`` the first process writes; the packs of the others
    are in memory alone.

    Args:
        config: a YAML file, a mapping or a :class:`TrainConfig`.
        overrides: ``key=value`` texts.
        progress: called after each step with how far the training is.
        rewards: functions that score answers, for ``trainer: grpo``: of ``completions``, ``prompts`` and the
            rows' other columns.

    Raises:
        ConfigError: an unknown key, a wrong value, or data of no known form.
        OutputExists: an output folder is taken, or checkpoints of another run lie beside it; found before
            anything is trained.
        StorageError: a data file or the base is missing; found before anything is trained.
        NonFinite: training diverged.
        NothingToDo: the adapter would act in no row.

    Example:
        >>> train("train.yaml", ["learning_rate=1e-3"])  # doctest: +SKIP
    """
    packs: dict[str, Pack] = {}
    configs = checked_configs(config, overrides, rewards)
    for run_config in configs:
        refuse_existing(Path(run_config.output_dir), "output_dir=...")
    for group in _groups(configs):
        written = _train_several(group, progress, rewards)
        packs |= zip((one.output_dir for one in group), written, strict=True)
    return [packs[one.output_dir] for one in configs]


def checked_configs(
    config: str | os.PathLike[str] | Mapping[str, Any] | TrainConfig,
    overrides: Iterable[str] = (),
    rewards: Sequence[Reward] = (),
) -> list[TrainConfig]:
    """The configurations of a run's adapters, after all that can be checked before a model is loaded.

    Raises:
        ConfigError, StorageError: see :func:`train`.
    """
    read, notes = read_config(config, overrides)
    for note in notes:
        log.info("%s", note)
    configs = [with_settings_of_the_pack(one) for one in read]
    for run_config in configs:
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
    kind, task = TRAINERS[config.trainer], get_task(config.task)
    require_task(kind, task)
    require_rewards(kind, rewards)
    if not kind.rows:
        training_of(task, kind)
    elif config.group_by_length:
        raise ConfigError(
            f"the trainer {kind.name} cannot group rows by their length",
            where="group_by_length",
            remedy="leave it out",
        )


def train_one(
    config: TrainConfig, progress: Shown | None = None, rewards: Sequence[Reward] = ()
) -> tuple[Pack, Any]:
    """Trains one adapter and writes its pack; returns the pack and the model with the adapter active in
    it.
    """
    done = train_adapter(config, progress, rewards)
    return write_pack(done), done.ready.model


def _train_several(
    configs: Sequence[TrainConfig], progress: Shown | None, rewards: Sequence[Reward]
) -> list[Pack]:
    """Train adapters one after the other over a base that is in memory once; pack them when all are trained.

    Each has its own model, whose modules hold the base's parameters with those of the others, its own
    optimizer, data, and random numbers: it gets the bytes that it would get alone.
    """
    bases, done = SharedBases() if len(configs) > 1 else None, list[TrainedAdapter]()
    try:
        for config in configs:
            done.append(train_adapter(config, progress, rewards, bases))
        return list(map(write_pack, done))
    except BaseException as error:
        if isinstance(error, Exception) and len(done) < len(configs) > 1:
            error.add_note(f"this happened to adapter '{configs[len(done)].pack_name}'")
        for note in (one.folder.kept_note() for one in done):
            if note and note not in getattr(error, "__notes__", ()):
                error.add_note(note)
        raise
    finally:
        for one in done:
            one.folder.release()


def _groups(configs: Sequence[TrainConfig]) -> list[list[TrainConfig]]:
    """The configurations that are trained together: those of one base, held in one way; each by itself where
    processes share a model.
    """
    launched = any(
        os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"
        for engine in ("FSDP", "DEEPSPEED")
    )
    if launched or PartialState().num_processes > 1:
        return [[config] for config in configs]
    groups: dict[tuple[object, ...], list[TrainConfig]] = {}
    for config in configs:
        base = folder_of(config.model_name_or_path), config.dtype, config.load_in_4bit, config.load_in_8bit
        groups.setdefault(base, []).append(config)
    return list(groups.values())
