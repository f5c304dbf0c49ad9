"""Runs trainings: from a configuration and data to packs, with ``transformers.Trainer`` as the loop and the
model's own class.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from ..errors import ConfigError
from ..hub import folder_of
from ..io import refuse_existing
from ..pack import Pack
from ..paths import StrPath
from ..tasks import get_task
from .config.config import read_config
from .config.fields import TrainConfig
from .config.sources import sources_of
from .data.decompress import files_of
from .data.in_memory import Rows, rows_as_files
from .first_config import with_suggestions
from .loop.arguments import arguments_of
from .loop.continue_training import with_settings_of_the_pack
from .loop.extended_base import on_own_base
from .loop.preparing import training_of
from .loop.rewards import Reward, require_rewards
from .loop.run import Shown, TrainedAdapter, train_adapter, write_pack
from .loop.shared_bases import SharedBases
from .loop.steps import Step
from .trainers.kind import TRAINERS, require_task

log = logging.getLogger(__name__)


def train(
    config: StrPath | Mapping[str, Any] | TrainConfig,
    overrides: Iterable[str] = (),
    progress: Shown | None = None,
    rewards: Sequence[Reward] = (),
    tool: str | None = None,
    overwrite: bool = False,
    rows: Rows | None = None,
    eval_rows: Rows | None = None,
    suggest: bool = False,
) -> list[Pack]:
    """Trains the adapters that ``config`` describes, and writes a pack for each.

    Several adapters of one base are trained one after the other over a single copy of the base in memory, and
    written when all are trained; each becomes the pack that it would be if trained alone. During a run, its
    checkpoints are in ``OUTPUT_DIR.checkpoints``. After an interrupt or a crash, the same call resumes from
    the last checkpoint and ends with the same pack. Under ``torchrun`` or ``accelerate launch``, only the
    first process writes packs; the others return theirs from memory.

    Args:
        config: a YAML file, a mapping or a :class:`TrainConfig`.
        overrides: ``key=value`` strings, which take precedence.
        progress: called after each step with a :class:`~adapterpack.training.loop.steps.Step`; by default
            a bar in a terminal and in a notebook.
        rewards: functions that score answers, for ``trainer: grpo``; they take ``completions``, ``prompts``
            and the rows' other columns.
        tool: the tool that the configuration was written for: ``axolotl``, ``llamafactory``, ``trl`` or
            ``adapterpack``; by default what its keys show. Its names, defaults and meanings hold.
        overwrite: whether packs in the output folders are replaced, each when the new one is complete; the
            same as ``overwrite_output_dir`` in the configuration.
        rows, eval_rows: lists of rows or tables of ``datasets``, instead of the files that ``train_file`` and
            ``eval_file`` name.
        suggest: whether settings that the configuration leaves open follow from base, method and data, as in
            :func:`adapterpack.init`, instead of being the defaults.

    Raises:
        ConfigError: a key is unknown, a value is wrong, or the data has no known form.
        OutputExists: an output folder is taken, or its checkpoints are another run's; raised before training.
        StorageError: a data file or the base is missing; raised before training.
        NonFinite: training diverged.
        NothingToDo: the adapter would act in no row.

    Example:
        >>> train("train.yaml", ["learning_rate=1e-3"])  # doctest: +SKIP
        >>> rows = [{"text": "Where is it?", "label": "delivery"}, {"text": "It broke.", "label": "returns"}]
        >>> base = {"model_name_or_path": "models/MiniLM", "task": "text-classification"}
        >>> train({**base, "output_dir": "packs/tickets"}, rows=rows, overwrite=True)  # doctest: +SKIP
    """
    with (
        rows_as_files(config, train_file=rows, eval_file=eval_rows) as named,
        _show_progress(progress) as shown,
    ):
        settings = [*overrides, *named, *(["overwrite_output_dir=true"] if overwrite else [])]
        return _train(checked_configs(config, settings, rewards, tool, suggest), shown, rewards)


@contextmanager
def _show_progress(progress: Shown | None) -> Iterator[Shown | None]:
    """Yields a function that shows the progress: the caller's, or a bar where somebody sees it."""
    if progress is not None or not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        yield progress
        return
    bars: dict[str, Any] = {}

    def show(step: Step) -> None:
        bar = bars.get(step.name) or bars.setdefault(
            step.name, tqdm(desc=step.name or "train", total=step.total, unit="step")
        )
        bar.set_postfix_str(step.figures, refresh=False)
        bar.update(step.done - bar.n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()


def _train(configs: Sequence[TrainConfig], progress: Shown | None, rewards: Sequence[Reward]) -> list[Pack]:
    packs: dict[str, Pack] = {}
    for run_config in configs:
        refuse_existing(run_config.output_dir, "output_dir=...", run_config.overwrite_output_dir)
    for group in _groups(list(map(on_own_base, configs))):
        written = _train_several(group, progress, rewards)
        packs |= zip((one.output_dir for one in group), written, strict=True)
    return [packs[one.output_dir] for one in configs]


def checked_configs(
    config: StrPath | Mapping[str, Any] | TrainConfig,
    overrides: Iterable[str],
    rewards: Sequence[Reward],
    tool: str | None,
    suggest: bool,
) -> list[TrainConfig]:
    """Reads the configurations of a run's adapters and makes all checks that need no model; with ``suggest``,
    settings that they leave open follow from base, method and data.

    Raises:
        ConfigError, StorageError: see :func:`train`.
    """
    read, notes = read_config(config, overrides, tool)
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
    return [with_suggestions(one) for one in configs] if suggest else configs


def require_trainable(config: TrainConfig, rewards: Sequence[Reward]) -> None:
    """Raises unless the task can be trained by the trainer that the configuration names.

    Raises:
        ConfigError, Unsupported: it cannot.
    """
    kind = TRAINERS[config.trainer]
    task = get_task(config.task)
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


def train_one(config: TrainConfig, progress: Shown | None = None) -> tuple[Pack, Any]:
    """Trains one adapter and writes its pack; returns the pack and the model with the adapter active."""
    done = train_adapter(on_own_base(config), progress, ())
    return write_pack(done), done.ready.model


def _train_several(
    configs: Sequence[TrainConfig], progress: Shown | None, rewards: Sequence[Reward]
) -> list[Pack]:
    """Trains adapters one after the other over one copy of their base in memory, then writes all packs.

    Each adapter has its own model, whose modules hold the same base parameters as the others', and its own
    optimizer, data and random numbers, so the result is bit for bit that of training it alone.
    """
    bases = SharedBases() if len(configs) > 1 else None
    done = list[TrainedAdapter]()
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
    """Groups the configurations that can share a base: those of the same base in the same precision. Under
    several processes, each is a group of its own.
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
