"""Maps the names of a model's parameters to those in its checkpoint, and finds parameters that the checkpoint
lacks.

transformers renames, fuses and splits weights while it loads some architectures, so that a parameter's path
in memory is not its name on disk. A pack records both: the path in the model and the weight's name in the
checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, WeightConverter

from ..base import Checkpoint, in_memory, name_rows, renamings_of
from ..base.renamings import Step, find, rename_all
from ..errors import AdapterpackError
from ..hub import folder_at_hand
from ..io import TensorInfo
from ..pack import Pack, move_paths
from ..pack.on_base import weight_names
from .layers import base_modules
from .layers.tensors import whole_shape


def stored_names(model: nn.Module, stored: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Maps each parameter of ``model`` that loading only renames, or cuts off the rows of one of ``stored``,
    the checkpoint's tensors, to its name there.

    Parameters that loading makes of several tensors are left out: no single tensor holds them.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    steps = _steps(model)
    (_, converters) = _transforms(model) or ([], [])
    parameters = {
        f"{path}.{leaf}".lstrip(".") for path, module in base_modules(model) for leaf in module._parameters
    }
    prefix = f"{model.base_model_prefix}."
    stored_by_name = {}
    for name, info in stored.items():
        name_in_model = in_memory(name, steps)
        for converted, rows in _converted(model, converters, name_in_model, info):
            # A checkpoint may be of the class without a head, or the reverse.
            shorter = [converted.removeprefix(prefix)] if converted.startswith(prefix) else []
            place = next(
                (place for place in (*shorter, f"{prefix}{converted}", converted) if place in parameters),
                None,
            )
            if place is not None:
                stored_by_name[place] = name if rows is None else name_rows(name, *rows)
    return {**_shared_names(model, stored_by_name), **stored_by_name}


def _converted(
    model: PreTrainedModel, converters: Sequence[WeightConverter], name: str, info: TensorInfo
) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Yields the parameters that loading makes of one tensor, and which of its rows each is, None for all.

    The converter itself is asked: given the numbers of the rows, it says where each of them goes.
    """
    for converter in converters:
        target, matched = converter.rename_source_key(name)
        if matched is None:
            continue
        first, *others = converter.target_patterns
        if not others or len(converter.source_patterns) > 1 or "*" in matched or not info.shape:
            return
        few = [min(size, 2) for size in info.shape[1:]]
        numbers: dict[str, Any] = {matched: _row_numbers(0, info.shape[0], few)}
        with suppress(RuntimeError, ValueError):  # an operation that is none on rows
            for operation in converter.operations:
                numbers = operation.convert(
                    numbers,
                    source_patterns=converter.source_patterns,
                    target_patterns=converter.target_patterns,
                    full_layer_name=target,
                    model=model,
                    config=model.config,
                )
            for pattern, found in numbers.items():
                start = int(found.flatten()[0])
                stop = int(found.flatten()[-1]) + 1
                if torch.equal(found, _row_numbers(start, stop, few)):
                    yield target.replace(first, pattern), (start, stop)
        return
    yield name, None


def _row_numbers(start: int, stop: int, shape: Sequence[int]) -> torch.Tensor:
    """Returns a tensor in which every element of a row, of this shape, is the row's number."""
    return torch.arange(start, stop).view(-1, *(1 for _ in shape)).expand(-1, *shape)


def _shared_names(model: PreTrainedModel, names: Mapping[str, str]) -> dict[str, str]:
    """Returns the names in the checkpoint of further modules' parameters that are those among ``names``, as
    in a block that a model has at several places (Zamba); embeddings and heads are tied in their own way.
    """
    own = {id(module) for module in _embeddings(model)}
    every = [
        (f"{path}.{leaf}".lstrip("."), id(parameter))
        for path, module in base_modules(model)
        for leaf, parameter in module._parameters.items()
        if parameter is not None and id(module) not in own
    ]
    found = {key: names[name] for name, key in every if name in names}
    return {name: found[key] for name, key in every if key in found}


def rename_sites(model: nn.Module, pack: Pack, sites: Collection[str]) -> Pack:
    """Returns the pack with its paths renamed to those in ``model``, where the pack uses the checkpoint's
    names or those of another version of transformers.

    ``sites`` are the paths of the model's sites; paths among them stay.
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
    """Returns the renamings that transformers applies when it loads such a model: those of the installed
    version if it exposes them, else this package's own table.
    """
    transforms = _transforms(model)
    if transforms is None:
        return renamings_of(model.config.to_dict(), type(model).__name__)
    return [partial(_rename, renaming) for renaming in transforms[0]]


def _rename(renaming: Any, name: str) -> str:
    """Applies one of transformers' renamings to a name."""
    renamed_name: str = renaming.rename_source_key(name)[0]
    return renamed_name


def _transforms(model: nn.Module) -> tuple[list[Any], list[WeightConverter]] | None:
    """Returns transformers' renamings and its converters, which fuse or split tensors, for this model; None
    if the installed version does not expose them.
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
    """Returns the tensors of the checkpoint that the model says it was loaded from, by name; empty if it is
    not on this machine.
    """
    config = getattr(model, "config", None)
    source = getattr(config, "_name_or_path", None)
    folder = folder_at_hand(source, getattr(config, "_commit_hash", None)) if source else None
    try:
        return {} if folder is None else Checkpoint(folder).tensors
    except AdapterpackError:
        return {}


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the input embeddings and the output head, as far as the model declares them; models of several
    parts do not.
    """
    found = []
    for getter in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(NotImplementedError):
            found.append(getter())
    return [module for module in found if isinstance(module, nn.Module)]


def drawn_modules(model: nn.Module, checkpoint: Checkpoint | None = None) -> list[str]:
    """Returns the paths of modules with parameters that the checkpoint lacks or has in another shape: every
    load initialises them randomly.

    ``checkpoint`` is the one that the model was loaded from, where the caller knows it better than the model.
    The result is empty if no checkpoint is on this machine, if it holds less than half of the model, or if
    transformers does not expose its renamings. Resized embeddings are left out.
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
    # a table that the class computes, such as Marian's positions, is in no checkpoint
    computed = getattr(model, "_keys_to_ignore_on_save", None) or ()
    paths: dict[int, str] = {}
    sizes = {}
    for path, module in base_modules(model):
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{leaf}".lstrip(".")
            shape = whole_shape(parameter)
            sizes[id(parameter)] = math.prod(shape)
            fits = name in computed or (
                name in names
                and (not parameter.is_floating_point() or tuple(stored[names[name]].shape) == shape)
            )
            if fits or any(pattern.search(name) for pattern in converted):
                held.add(id(parameter))
            paths.setdefault(id(parameter), path)
    drawn = sizes.keys() - held
    # If most of the model seems missing, the names were not understood: better to claim nothing.
    if 2 * sum(sizes[key] for key in drawn) > sum(sizes.values()):
        return []
    return list(dict.fromkeys(path for key, path in paths.items() if key in drawn and path))
