"""Imports the folders that PEFT writes as packs."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..adapter_methods import WITH_BASE, BaseChange, OfBase
from ..errors import ConfigError, Unsupported
from ..io import LARGE, TENSORS, Json, SafetensorsFile, Streamed
from ..manifest import MethodSites, plain_name
from ..manifest import manifest as m
from ..peft import base_hint, layout, read_config, require_tensors, unknown_sentence
from ..tasks import task_of_peft
from .pack import Pack, build


class Imported(NamedTuple):
    """A pack imported from a PEFT folder, the unknown options in its config
    (:func:`~..peft.options.unknown_options`), and what PEFT did to the base. If it did something, the pack
    belongs to the base as PEFT left it.
    """

    pack: Pack
    unknown: Json
    base_change: BaseChange | None = None


def read(folder: Path, name: str | None = None, on_base: bool = False) -> Pack:
    """Returns the pack of :func:`import_folder`, and warns if the folder has options that are not known."""
    pack, unknown, _ = import_folder(folder, name, on_base)
    if unknown:
        warnings.warn(f"{folder}: {unknown_sentence(unknown)}", stacklevel=2)
    return pack


def import_folder(
    folder: Path,
    name: str | None = None,
    on_base: bool = False,
    tensors: SafetensorsFile | None = None,
    base: OfBase | None = None,
    task: str | None = None,
) -> Imported:
    """Creates a pack from a folder that PEFT wrote. Its base is known only by name, so its digests are empty.

    ``on_base``: import tensors unchanged even if they only mean something together with the base, for a
    caller that completes them. ``tensors``: their file, if it is elsewhere. ``base`` describes the base, if
    available. ``task`` selects one of several tasks that the folder holds; the default is the first.

    Raises:
        ConfigError: the folder has no such task.
        FormatError: the folder is not a PEFT adapter, or its tensors do not pair up.
        Unsupported: the folder uses a method or an option that adapterpack cannot reproduce exactly.
    """
    config = read_config(folder / layout.CONFIG)
    if tensors is None:
        require_tensors(folder / TENSORS)
    path = folder / TENSORS
    large = (
        SafetensorsFile(path) if tensors is None and path.is_file() and path.stat().st_size > LARGE else None
    )
    content = layout.content_of(folder, config, (), tensors or large, base=base)
    turned = content.method.peft is not None and "from_peft_with_base" in content.method.peft.overrides
    if (turned or content.base_change is not None) and not on_base:
        why = (
            "what these tensors mean depends on the singular vectors of the base"
            if content.base_change is None
            else content.base_change.why
        )
        found = config.get("peft_type") if content.base_change is None else config.get("init_lora_weights")
        raise Unsupported(
            why,
            where=folder,
            expected="the base",
            found=str(found)[:80],
            remedy=WITH_BASE,
        )
    adapters = content.adapters if task is None else _doing(content, task, folder)
    kind = task_of_peft(config.get("task_type"))
    version = config.get("peft_version")
    pack = build(
        name or plain_name(folder.resolve().name),
        content.method,
        adapters,
        shared=content.shared,
        full=content.full,
        secondary=[MethodSites(*sites) for sites in content.secondary],
        task=m.PackTask(kind),
        base=base_hint(config),
        training={"imported_from": "peft", **({"peft_version": version} if isinstance(version, str) else {})},
    )
    if large is not None:
        digests = {key: entry.sha256 for key, entry in pack.manifest.tensors.items()}
        pack = replace(pack, tensors=Streamed.of(large, pack.tensors, digests))
    return Imported(pack, content.unknown, content.base_change)


def _doing(content: layout.Content, task: str, folder: Path) -> layout.Adapters:
    """Returns the sites with configs that select the task."""
    field = content.method.config.task_field
    if not field:
        raise ConfigError(
            f"an adapter of the method {content.method.name} has no tasks to choose from",
            where=folder,
            found=task,
            remedy="leave --part out",
        )
    try:
        return {
            site: (replace(cfg, **{field: int(task) if task.isdecimal() else task}), params)
            for site, (cfg, params) in content.adapters.items()
        }
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the folder holds no such task: {error}",
            where=folder,
            found=task,
            remedy="name another with --part",
        ) from error
