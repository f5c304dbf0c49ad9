"""Finds the checkpoint's names of weights that transformers renames while it loads them, and the weights that
it does not hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel, WeightConverter

from ..base.checkpoint import Checkpoint
from ..base.renamings import Step, find, in_memory, rename_all, renamings_of
from ..errors import AdapterpackError
from ..hub.resolve import folder_at_hand
from ..pack.on_base import move_paths, weight_names
from ..pack.pack import Pack
from .layers.tensors import whole_shape
from .layers.wrapper import base_modules


def stored_names(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Name of a parameter in ``model`` -> name in the checkpoint whose tensor names are ``stored``, of those
    that are only renamed.

    What is put together from several tensors, or taken apart, is left out: no one tensor holds it.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    steps, (_, converters) = _steps(model), _transforms(model) or ([], [])
    parameters = {
        f"{path}.{leaf}".lstrip(".") for path, module in base_modules(model) for leaf in module._parameters
    }
    prefix, stored_by_name = f"{model.base_model_prefix}.", {}
    for name in stored:
        name_in_model = in_memory(name, steps)
        if any(converter.rename_source_key(name_in_model)[1] is not None for converter in converters):
            continue
        # A checkpoint may be of the class without a head, or the reverse.
        shorter = [name_in_model.removeprefix(prefix)] if name_in_model.startswith(prefix) else []
        place = next(
            (place for place in (*shorter, f"{prefix}{name_in_model}", name_in_model) if place in parameters),
            None,
        )
        if place is not None:
            stored_by_name[place] = name
    return stored_by_name


def rename_sites(model: nn.Module, pack: Pack, sites: Collection[str]) -> Pack:
    """The pack with the paths that its modules have in ``model``, where it calls them as a checkpoint does,
    or as another version of transformers; ``sites`` are those of the model.
    """
    names = {path: name for path, name in weight_names(pack).items() if path not in sites}
    if not names or not isinstance(model, PreTrainedModel):
        return pack
    steps = _steps(model)
    known = rename_all({*sites, *(f"{path}.weight" for path in sites)}, steps)
    places = {path: find(in_memory(name, steps), known) for path, name in names.items()}
    return move_paths(
        pack, {path: place.removesuffix(".weight") for path, place in places.items() if place is not None}
    )


def _steps(model: PreTrainedModel) -> Sequence[Step]:
    """What transformers renames when it loads such a model: as the version that runs says, else as the one
    that the table is of.
    """
    transforms = _transforms(model)
    if transforms is None:
        return renamings_of(model.config.to_dict(), type(model).__name__)
    return [partial(_rename, renaming) for renaming in transforms[0]]


def _rename(renaming: Any, name: str) -> str:
    renamed_name: str = renaming.rename_source_key(name)[0]
    return renamed_name


def _transforms(model: nn.Module) -> tuple[list[Any], list[WeightConverter]] | None:
    """What only renames a tensor, and what puts tensors together or takes them apart; None where transformers
    does not say.
    """
    try:
        # not public, though PEFT uses it, too
        from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415
    except ImportError:
        return None
    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    return [transform for transform in transforms if not isinstance(transform, WeightConverter)], converters


def _stored_tensors(model: nn.Module) -> Mapping[str, Any]:
    """The tensors of the checkpoint that a model says it came from, by name, as far as it is on this
    machine.
    """
    config = getattr(model, "config", None)
    source = getattr(config, "_name_or_path", None)
    folder = folder_at_hand(source, getattr(config, "_commit_hash", None)) if source else None
    try:
        return {} if folder is None else Checkpoint(folder).tensors
    except AdapterpackError:
        return {}


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """The embeddings and the output head of a model that says which they are; models of several parts do
    not.
    """
    found = []
    for getter in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(NotImplementedError):
            found.append(getter())
    return [module for module in found if isinstance(module, nn.Module)]


def drawn_modules(model: nn.Module, checkpoint: Checkpoint | None = None) -> list[str]:
    """The paths of modules with weights that the checkpoint of the model does not hold, or in another shape:
    every load draws them anew.

    ``checkpoint`` is the one that the model came from, if that is known better than by the model. Empty where
    it is not at hand, holds less than half of the model, or transformers does not say what it renames;
    resized embeddings are left out.
    """
    transforms = _transforms(model) if isinstance(model, PreTrainedModel) else None
    stored = _stored_tensors(model) if checkpoint is None else checkpoint.tensors
    if transforms is None or not stored:
        return []
    names = stored_names(model, stored)
    converted = [
        re.compile(".*".join(map(re.escape, pattern.split("\\1"))))
        for converter in transforms[1]
        for pattern in converter.target_patterns
    ]
    held = {id(parameter) for embedding in _embeddings(model) for parameter in embedding.parameters()}
    paths: dict[int, str] = {}
    sizes: dict[int, int] = {}
    for path, module in base_modules(model):
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{leaf}".lstrip(".")
            shape = whole_shape(parameter)
            sizes[id(parameter)] = math.prod(shape)
            fits = name in names and (
                not parameter.is_floating_point() or tuple(stored[names[name]].shape) == shape
            )
            if fits or any(pattern.search(name) for pattern in converted):
                held.add(id(parameter))
            paths.setdefault(id(parameter), path)
    drawn = sizes.keys() - held
    if 2 * sum(sizes[key] for key in drawn) > sum(sizes.values()):
        return []
    return list(dict.fromkeys(path for key, path in paths.items() if key in drawn and path))
