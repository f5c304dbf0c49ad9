"""Saves a trained adapter of a model as a pack: its tensors, the fingerprint of its base, and a canary."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn

from ..adapter_methods import Arrays, Method, Site, is_bare
from ..base import Checkpoint
from ..base.base_metadata import license_of, tokenizer_of
from ..errors import AdapterpackError, SiteNotFound, Unsupported
from ..io import refuse_existing
from ..manifest import MethodSites, PackTokenizer
from ..manifest import manifest as m
from ..pack import TEMPLATE, Pack, build, descend, is_module, seal
from ..paths import StrPath
from ..peft.readers import line
from ..tasks import NO_TASK, TASKS, type_of
from ..tasks.data import ONE
from ..tasks.task import takes_ids
from ..version import VERSION
from .canaries.canary import make_canary
from .checkpoint_names import drawn_modules, stored_names
from .layers import (
    HeadLabels,
    adapted_layers,
    adapter_names,
    as_numpy,
    is_inside,
    require_names,
    require_unmerged,
    saved_modules,
    unused_of,
)
from .layers.modules_to_save import labels_of, own_outputs
from .layers.wrapper import path_order
from .model_base import base_of, checkpoint_of, quantization_of

log = logging.getLogger(__name__)


def save(
    model: nn.Module,
    out: StrPath | None,
    *,
    adapter: str | None = None,
    base: StrPath | None = None,
    name: str | None = None,
    training: Mapping[str, Any] | None = None,
    metrics: tuple[Mapping[str, Any], ...] = (),
    parents: Sequence[Pack] = (),
    chat_template: str | None = None,
    replace: bool = False,
) -> Pack:
    """Packs an adapter of ``model`` into the new folder ``out`` (None: in memory only) and returns the pack.

    With ``replace`` it takes the place of a pack that is there. ``adapter`` defaults to the model's only
    adapter, ``base`` to where the model was loaded from, and ``name`` to the folder's name. ``training`` is
    recorded as a claim about the training, next to the versions of the libraries. ``parents`` are the packs
    from which the training continued, ``chat_template`` is the Jinja text of the chats in training where it
    is not the base's own. The pack holds the fingerprint of the base and its quantization, the digests of its
    tokenizer, and a canary if the model takes token ids, images or speech.

    Raises:
        NonFinite: a trained tensor, or what the adapted model gives, holds NaN or infinity.
        OutputExists: ``out`` is taken.
        SiteNotFound: the adapter changes a module that the base's checkpoint does not hold.
        UnknownAdapter: the model has no adapter of that name.
    """
    refuse_existing(out, replace=replace)
    require_unmerged(model)
    names = adapter_names(model)
    if adapter is None and len(names) != 1:
        raise AdapterpackError(
            "the model holds several adapters or none",
            found=", ".join(names) or "none",
            remedy="name one with adapter=",
        )
    chosen = adapter or names[0]
    parts = parts_of(model, chosen)
    task = _task(model)
    checkpoint = checkpoint_of(model, base)
    # A head from a pack brings its labels along; a head that :func:`adapt` added has those in the model's
    # config.
    head = labels_of(model, chosen) or _own_labels(model, task, bool(parts.full))
    pack = build(
        name or (Path(out).name if out is not None else chosen),
        parts.method,
        parts.adapters,
        secondary=parts.secondary,
        shared=parts.shared,
        full=parts.full,
        task=m.PackTask(
            task,
            None if getattr(model, "config", None) is None else type(model).__name__,
            None if head is None else head.names,
        ),
        problem=None if head is None else head.problem,
        base=base_of(model, checkpoint),
        weights=_weights(model, parts, checkpoint),
        canary=make_canary(model, chosen),
        training={
            "framework_versions": {
                "adapterpack": VERSION,
                "torch": str(torch.__version__),
                "transformers": version("transformers"),
            },
            **(training or {}),
        },
        metrics=metrics,
        lineage=descend("train", parents, {}) if parents else None,
        base_quantization=quantization_of(model),
        tokenizer=tokenizer_of(checkpoint) if checkpoint else None,
        base_license=license_of(checkpoint.folder) if checkpoint else None,
    )
    if chat_template is not None:
        pack = _with_template(pack, chat_template.encode("utf-8"))
    _require_held(pack, drawn_modules(model, checkpoint))
    if out is None:
        return pack
    written = pack.write(out, replace)
    log.info("%s: %s", out, line(written))
    return written


def _with_template(pack: Pack, template: bytes) -> Pack:
    """Returns a pack that carries the chat template that it was trained with."""
    said = pack.manifest.tokenizer or PackTokenizer()
    tokenizer = msgspec.structs.replace(said, chat_template=hashlib.sha256(template).hexdigest())
    tensors = next(file for file in pack.manifest.files if file.role == "tensors")
    manifest = msgspec.structs.replace(pack.manifest, tokenizer=tokenizer)
    return seal(manifest, pack.tensors, {TEMPLATE: template}, tensors)


def _require_held(pack: Pack, drawn: list[str]) -> None:
    """Raises if the adapter changes a module that the base's checkpoint does not hold: no one could attach
    the pack.
    """
    for group in pack.manifest.groups:
        if group.role == "adapter" and is_inside(group.path, drawn):
            raise SiteNotFound(
                "the adapter changes a module that the base does not hold, so the pack could never be "
                "attached",
                where=pack.where,
                found=group.path,
                remedy="train such modules whole: modules_to_save of the config names them",
            )


def _task(model: nn.Module) -> str:
    """Returns the task of the model's class; none for a plain module, and none for a feature extractor whose
    inputs are not token ids or images.
    """
    config = getattr(model, "config", None)
    if config is None:
        return NO_TASK
    name = type_of(type(model).__name__, config.to_dict() if hasattr(config, "to_dict") else None)
    return NO_TASK if name == "feature-extraction" and not takes_ids(model) else name


def _own_labels(model: nn.Module, task: str, head: bool) -> HeadLabels | None:
    """Returns the labels in the model's config if a ``head`` was trained with the adapter and the task has
    labels.
    """
    if not head or task not in TASKS or not TASKS[task].labelled:
        return None
    names, problem = own_outputs(model)
    return HeadLabels(tuple(names[number] for number in sorted(names)), problem or ONE.name)


def _weights(model: nn.Module, parts: Parts, checkpoint: Checkpoint | None) -> dict[str, str | None]:
    """Maps each path that the pack changes to the name of its weight in the checkpoint, or in the model if it
    has no checkpoint.
    """
    sites = [
        site
        for adapters in (parts.adapters, *(guest.adapters for guest in parts.secondary))
        for site in adapters
    ]
    paths: dict[str, str | None] = {
        site.path: site.path if is_bare(site.kind) else f"{site.path}.weight"
        for site in sites
        if is_module(site.path)
    }
    paths |= {path: f"{path}.weight" for path in parts.full}
    if checkpoint is None:
        return paths
    names_by_path = {path: checkpoint.weight_name(path) for path in paths}
    if None in names_by_path.values():
        names = stored_names(model, checkpoint.tensors)
        names_by_path = {path: name or names.get(str(paths[path])) for path, name in names_by_path.items()}
    return names_by_path


class Parts(NamedTuple):
    """One adapter, as a pack stores it.

    ``adapters`` maps each site to its config and its parameters in stored form; ``secondary`` holds the sites
    of further methods; ``shared`` the parameters that all sites share; ``full`` maps the path of each module
    that was trained in full to its parameters.
    """

    method: Method
    adapters: dict[Site, tuple[Any, Arrays]]
    secondary: list[MethodSites]
    shared: Arrays
    full: dict[str, Arrays]


def parts_of(model: nn.Module, name: str) -> Parts:
    """Returns the parts of the adapter ``name``, without layers that the model does not use.

    Raises:
        UnknownAdapter: the model has no adapter of that name.
    """
    require_names(model, [name])
    unused = unused_of(model, name)
    adapted = [module for module in adapted_layers(model, name) if module._site.path not in unused]
    if not adapted:
        raise Unsupported(
            "this adapter changes no layer by a method, so its method is not known here",
            where=name,
            remedy="keep the pack that it came from",
        )
    # Nested wrappers come outermost first, the last one added; list their sites in the model's order instead.
    order = path_order(model)
    adapted.sort(key=lambda module: order.get(module._site.path, len(order)))
    method = min((module._held[name] for module in adapted), key=lambda held: held.secondary).method
    sites_by_method: dict[str, dict[Site, tuple[Any, Arrays]]] = {method.name: {}}
    methods = {}
    for module in adapted:
        held = module._held[name]
        methods[held.method.name] = held.method
        part = (held.config, module._params(name))
        to_stored = held.method.storage.to_stored
        sites_by_method.setdefault(held.method.name, {})[module._site] = (
            part if to_stored is None else to_stored(*part, module._site)
        )
    shared = {key: as_numpy(value) for module in adapted for key, value in module._shared(name).items()}
    secondary = [
        MethodSites(methods[name], sites) for name, sites in sites_by_method.items() if name != method.name
    ]
    full = {module._site.path: module._params(name) for module in saved_modules(model, name)}
    return Parts(method, sites_by_method[method.name], secondary, shared, full)
