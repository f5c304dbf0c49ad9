"""Checks that a model has the sites that a pack changes, and that the pack is for the model's task."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..adapter_methods import PROMPT
from ..errors import SiteNotFound, UnknownName, Unsupported, require_among
from ..manifest import Described
from ..tasks import NO_TASK, Task, get_task


def require_sites(pack: Described, paths: Mapping[str, Any], where: object) -> None:
    """Checks that every module the pack changes is among ``paths``.

    Raises:
        SiteNotFound: a module is missing; the error names the nearest path.
    """
    for group in pack.manifest.groups:
        if group.role != "shared" and group.path != PROMPT:
            what = f"pack '{pack.name}' changes a site that is not there"
            require_among(what, group.path, paths, SiteNotFound, where, found=group.path)


def task_of(pack: Described) -> Task | None:
    """Returns the task that a pack is for; None if it names none, or an unknown one."""
    try:
        return get_task(pack.outline.task.type)
    except UnknownName:
        return None


def require_task(pack: Described, task: Task, accepted: Collection[str] = ()) -> None:
    """Checks that a pack is for ``task`` or for no task. A pack for a task in ``accepted`` passes, too, if it
    has no head for that task.

    Raises:
        Unsupported: the pack is for another task.
    """
    name = pack.outline.task.type
    own = task_of(pack)
    if name == NO_TASK or own is task:
        return
    # A pack that brings its own trained head cannot serve another task's head.
    heads = () if own is None else own.heads
    whole = [group.path for group in pack.outline.groups if group.role == "full"]
    head = next((path for path in whole if path.rpartition(".")[2] in heads), None)
    if name not in accepted or head is not None:
        raise Unsupported(
            "the pack has a head for another task" if head else "the pack is for another task",
            where=", ".join([pack.where, *([head] if head else [])]),
            expected=task.name,
            found=name,
            remedy="export it for its own task: adapterpack export BASE PACK -o BUNDLE",
        )
