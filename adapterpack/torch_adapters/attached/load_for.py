"""Loads the base that a pack was made for, and attaches the pack to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...base import Checkpoint, is_repo
from ...errors import ConfigError
from ...hub import folder_of
from ...hub.transport import names
from ...pack import Pack, load
from ...paths import StrPath
from ...tasks import TASKS, Task, task_of
from .. import attach
from ..models.load import load_for_task, stored_dtype

_DTYPES = ("float32", "float16", "bfloat16", "float64")


def load_for(
    pack: Pack | StrPath,
    base: StrPath | None = None,
    *,
    name: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    check_canary: bool = True,
) -> Any:
    """The model that a pack was made for, in evaluation mode, with the pack attached and active.

    ``pack`` is a :class:`~adapterpack.Pack`, its folder, or ``hf://org/name``; PEFT folders are packs, too.
    ``base`` is a folder or a model on a hub; by default the base that the pack names, at the commit that it
    names. The model has the class for the pack's task and the labels of its head, as ``AutoModelFor...``
    loads it; code in the base's or the pack's repository is never run. ``dtype`` defaults to the one in which
    the base is stored; the adapter stays float32. ``name`` is the adapter's name in the model. The base is
    checked as by :func:`~adapterpack.attach`.

    Raises:
        ConfigError: the pack names no base on a hub and ``base`` is missing, or ``dtype`` is not a float
            type.
        BaseMismatch, ParityError, SiteNotFound: see :func:`~adapterpack.attach`.
        Unsupported: the base names code of its own, or has no model for the pack's task.
        StorageError, HubError: the base is not where it is looked for.

    Example:
        >>> model = load_for("packs/tickets", "models/all-MiniLM-L6-v2", dtype="bfloat16")  # doctest: +SKIP
    """
    opened = pack if isinstance(pack, Pack) else load(folder_of(pack))
    folder = folder_of(base) if base is not None else folder_of(_named_base(opened))
    task = task_for(opened, folder)
    said = opened.manifest.task
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
    """Returns the hub address of the base that a pack names; raises for a local path, which a stranger could
    have chosen.
    """
    name, commit = pack.manifest.base.name, pack.manifest.base.commit
    if name is None or not (is_repo(name) or commit):
        raise ConfigError(
            "the pack does not name a base on a hub",
            where=pack.where,
            found=name,
            remedy="give the base: load_for(pack, base)",
        )
    return f"{names.SCHEME}{name}" + (f"@{commit}" if commit else "")


def task_for(pack: Pack, folder: Path) -> Task:
    """Returns the pack's task, or, if the pack names none, that of the class that the base was saved from."""
    own = TASKS.find(pack.manifest.task.type)
    checkpoint = Checkpoint(folder)
    return own or task_of(pack.manifest.task.architecture or checkpoint.architecture or "", checkpoint.config)
