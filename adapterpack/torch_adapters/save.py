"""Saves a trained adapter of a model as a pack: its tensors, the fingerprint of its base, and a canary."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..adapter_methods import Method, Site, is_bare
from ..base import compatibility
from ..base import fingerprint as fp
from ..base.base_metadata import license_of, tokenizer_of
from ..base.checkpoint import Checkpoint
from ..base.compatibility import Verdict
from ..errors import AdapterpackError, SiteNotFound, Unsupported
from ..hub.resolve import folder_of
from ..io.atomic import refuse_existing
from ..io.safetensors import DTYPES
from ..manifest import manifest as m
from ..manifest.secondary_methods import MethodSites
from ..manifest.structs import Dims
from ..pack.lineage import descend
from ..pack.pack import Pack, build, is_module
from ..peft.readers import line
from ..tasks.data.problems import ONE
from ..tasks.task import NO_TASK, TASKS, takes_ids, type_of
from ..version import VERSION
from .base_quantization import quantization_of
from .canaries.canary import make_canary
from .checkpoint_names import drawn_modules, stored_names
from .layers.active import adapted_layers, adapter_names, require_names, require_unmerged, wrappers_of
from .layers.modules_to_save import HeadLabels, SavedModule, labels_of, own_outputs
from .layers.observers import unused_of
from .layers.tensors import as_numpy
from .layers.weights import tensor_of
from .layers.wrapper import base_modules, is_inside, path_order

log = logging.getLogger(__name__)
DTYPE_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
"""Maps numpy's and torch's names of dtypes to those of safetensors."""

_MAX_NAME = 128


def save(
    model: nn.Module,
    out: str | os.PathLike[str] | None,
    *,
    adapter: str | None = None,
    base: str | os.PathLike[str] | None = None,
    name: str | None = None,
    training: Mapping[str, Any] | None = None,
    metrics: tuple[Mapping[str, Any], ...] = (),
    parents: Sequence[Pack] = (),
) -> Pack:
    """Packs an adapter of ``model`` into the new folder ``out`` (None: in memory only) and returns the pack.

    ``adapter`` defaults to the model's only adapter, ``base`` to where the model was loaded from, and
    ``name`` to the folder's name. ``training`` is recorded as a claim about the training, next to the
    versions of the libraries. ``parents`` are the packs from which the training continued. The pack holds the
    fingerprint of the base and its quantization, the digests of its tokenizer, and a canary if the model
    takes token ids, images or speech.

    Raises:
        NonFinite: a trained tensor, or what the adapted model gives, holds NaN or infinity.
        OutputExists: ``out`` is taken.
        SiteNotFound: the adapter changes a module that the base's checkpoint does not hold.
        UnknownAdapter: the model has no adapter of that name.
    """
    if out is not None:
        refuse_existing(Path(out))
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
    task, checkpoint = _task(model), _checkpoint(model, base)
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
        base=_base(model, checkpoint),
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
    _require_held(pack, drawn_modules(model, checkpoint))
    if out is None:
        return pack
    written = pack.write(out)
    log.info("%s: %s", out, line(written))
    return written


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


def require_model_base(model: nn.Module, pack: Pack) -> Verdict | None:
    """Raises if ``model`` does not hold the base that ``pack`` was made for.

    Compares the checkpoint that the model was loaded from, or the model's own tensors if it has none. Returns
    how they compare, or None if the pack records nothing about its base.

    Raises:
        BaseMismatch: it does not.
    """
    checkpoint = _checkpoint(model, None)
    if checkpoint is not None:
        return pack.require_base(checkpoint)
    if any(compatibility.recorded_fingerprint(pack.manifest.base)):
        return pack.require_levels(_model_fingerprint(model), name=None, where=type(model).__name__)
    return None


def _checkpoint(model: nn.Module, base: str | os.PathLike[str] | None) -> Checkpoint | None:
    """Returns the checkpoint in ``base``, by default the one that the model was loaded from; None if there is
    none.
    """
    source = base or getattr(getattr(model, "config", None), "_name_or_path", None)
    return Checkpoint(folder_of(source)) if source else None


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


def _base(model: nn.Module, checkpoint: Checkpoint | None) -> m.Base:
    """Describes the base for the manifest: its name, commit, fingerprint, architecture and sizes."""
    config = getattr(model, "config", None)
    # A checkpoint on disk is the better evidence: it also identifies the files as a hub lists them.
    fingerprint = checkpoint.fingerprint(files=True) if checkpoint else _model_fingerprint(model)
    name, commit = (checkpoint.name, checkpoint.commit) if checkpoint else (None, None)
    return m.Base(
        name,
        commit,
        getattr(config, "model_type", None),
        fingerprint.structure,
        fingerprint.content,
        _architecture(checkpoint) if checkpoint else type(model).__name__,
        _dims(config),
        fingerprint.files,
        fingerprint.probe,
    )


def _architecture(checkpoint: Checkpoint) -> str | None:
    """Returns the class that the base was saved from, as its config names it; None for a name that a manifest
    may not hold.
    """
    name = checkpoint.architecture
    return name if name is not None and name.isascii() and len(name) <= _MAX_NAME else None


def _dims(config: Any) -> Dims | None:
    """Returns the sizes in the model's config, under the names that transformers gives every architecture."""
    names = {
        "hidden": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "vocab": "vocab_size",
    }
    sizes = {ours: getattr(config, theirs, None) for ours, theirs in names.items()}
    dims = Dims(**{name: size for name, size in sizes.items() if type(size) is int and size > 0})
    return None if dims == Dims() else dims


def _model_fingerprint(model: nn.Module) -> fp.Fingerprint:
    """Computes the fingerprint of a model without a checkpoint as that of the checkpoint that saving it would
    write; tied weights count once.
    """
    tensors, taken = [], set()
    for path, module in base_modules(model):
        passing = module._non_persistent_buffers_set
        values_by_leaf = [
            *module._parameters.items(),
            *((leaf, value) for leaf, value in module._buffers.items() if leaf not in passing),
        ]
        for leaf, value in values_by_leaf:
            if value is None or id(value) in taken:
                continue
            taken.add(id(value))
            value = tensor_of(module, leaf, f"{path}.{leaf}")  # noqa: PLW2901 - the same one, in memory
            raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            name = str(value.dtype).removeprefix("torch.")
            tensors.append(
                (
                    f"{path}.{leaf}".lstrip("."),
                    DTYPE_NAMES.get(name, name),
                    tuple(value.shape),
                    memoryview(raw),
                )
            )
    return fp.in_memory(tensors)


class Parts(NamedTuple):
    """One adapter, as a pack stores it.

    ``adapters`` maps each site to its config and its parameters in stored form; ``secondary`` holds the sites
    of further methods; ``shared`` the parameters that all sites share; ``full`` maps the path of each module
    that was trained in full to its parameters.
    """

    method: Method
    adapters: dict[Site, tuple[Any, dict[str, np.ndarray]]]
    secondary: list[MethodSites]
    shared: dict[str, np.ndarray]
    full: dict[str, dict[str, np.ndarray]]


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
    sites_by_method: dict[str, dict[Site, tuple[Any, dict[str, np.ndarray]]]] = {method.name: {}}
    methods: dict[str, Method] = {}
    for module in adapted:
        held = module._held[name]
        methods[held.method.name] = held.method
        part, to_stored = (held.config, module._params(name)), held.method.storage.to_stored
        sites_by_method.setdefault(held.method.name, {})[module._site] = (
            part if to_stored is None else to_stored(*part, module._site)
        )
    shared = {key: as_numpy(value) for module in adapted for key, value in module._shared(name).items()}
    secondary = [
        MethodSites(methods[name], sites) for name, sites in sites_by_method.items() if name != method.name
    ]
    full = {
        module._site.path: module._params(name)
        for module in wrappers_of(model, name)
        if isinstance(module, SavedModule)
    }
    return Parts(method, sites_by_method[method.name], secondary, shared, full)
