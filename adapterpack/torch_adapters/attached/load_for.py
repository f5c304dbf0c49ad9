"""Loads the base that a pack was made for, and attaches the pack to it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ...base.checkpoint import Checkpoint
from ...errors import ConfigError
from ...hub.resolve import folder_of
from ...hub.transport import names
from ...pack.pack import Pack
from ...pack.validate.validation import load
from ...tasks.task import TASKS, Task, task_of
from ..adapt import attach
from ..models.load import load_for_task, stored_dtype

_DTYPES = ("float32", "float16", "bfloat16", "float64")


def load_for(
    pack: Pack | str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    name: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    check_canary: bool = True,
) -> Any:
    """The model that a pack was made for, in evaluation mode, with the pack attached and active.

    ``pack`` is one, its folder, or ``hf://org/name``; PEFT's folders are packs, too. ``base`` is a folder or
    a hub's model; by default the one that the pack names on the hub, at the commit that it names. The model
    is of the pack's task, with the labels of its head, as ``AutoModelFor...`` loads it: never code of the
    base's or the pack's own. ``dtype`` is the base's stored one by default; the adapter stays float32.
    ``name`` is what to call the adapter. That the base is the right one is checked as
    :func:`~adapterpack.attach` does.

    Raises:
        ConfigError: the pack names no base on a hub, and none is given; or the dtype is none.
        BaseMismatch, ParityError, SiteNotFound: see :func:`~adapterpack.attach`.
        Unsupported: the base names code of its own, or has no model for the pack's task.
        StorageError, HubError: the base is not where it is looked for.

    Example:
        >>> model = load_for("packs/tickets", "models/all-MiniLM-L6-v2", dtype="bfloat16")  # doctest: +SKIP
    """
    opened = pack if isinstance(pack, Pack) else load(folder_of(pack))
    folder = folder_of(base) if base is not None else folder_of(_named_base(opened))
    task, said = _task(opened, folder), opened.manifest.task
    number = stored_dtype(folder) if dtype is None else str(dtype).removeprefix("torch.")
    if number not in _DTYPES:
        raise ConfigError(
            "a model cannot be loaded in this dtype",
            where="dtype",
            expected=", ".join(_DTYPES),
            found=repr(dtype),
        )
    model, _ = load_for_task(
        task, folder, said.labels if task.labelled else None, dtype=number, problem=opened.manifest.problem
    )
    if device is not None:
        model.to(device)
    return attach(model.eval(), opened, name, check_canary=check_canary)


def _named_base(pack: Pack) -> str:
    """The hub's address of the base that a pack names; never a path, which strangers could choose."""
    name, commit = pack.manifest.base.name, pack.manifest.base.commit
    if name is None or not (names.is_repo(name) or commit):
        raise ConfigError(
            "the pack does not name a base on a hub",
            where=f"pack '{pack.name}'",
            found=name,
            remedy="give the base: load_for(pack, base)",
        )
    return f"{names.SCHEME}{name}" + (f"@{commit}" if commit else "")


def _task(pack: Pack, folder: Path) -> Task:
    """The pack's task, or where it names none, that of the class that the base was saved from."""
    own = TASKS.find(pack.manifest.task.type)
    checkpoint = Checkpoint(folder)
    return own or task_of(pack.manifest.task.architecture or checkpoint.architecture or "", checkpoint.config)
