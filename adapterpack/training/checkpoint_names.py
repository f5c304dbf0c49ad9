"""Finds the checkpoint's names of weights that transformers renames while it loads them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel, WeightConverter

from .layers.wrapper import base_modules


def stored_names(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Name of a parameter in ``model`` -> name in the checkpoint whose tensor names are ``stored``, of those that are only renamed.

    What is put together from several tensors, or taken apart, is left out: no one tensor holds it.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415 - not public, though PEFT uses it, too
    except ImportError:
        warnings.warn("this version of transformers does not say how it renames weights while it loads them, so the pack does not say what "
                      "some of them are called in the checkpoint: PEFT loads it, and adapterpack refuses it there; save it again with "
                      "another version", stacklevel=2)
        return {}
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    parameters = {f"{path}.{leaf}".lstrip(".") for path, module in base_modules(model) for leaf in module._parameters}
    prefix, stored_by_name = f"{model.base_model_prefix}.", {}
    for name in stored:
        name_in_model = name
        for renaming in renamings:
            name_in_model, _ = renaming.rename_source_key(name_in_model)
        if any(converter.rename_source_key(name_in_model)[1] is not None for converter in converters):
            continue
        # A checkpoint may be of the class without a head, or the reverse.
        shorter = [name_in_model.removeprefix(prefix)] if name_in_model.startswith(prefix) else []
        place = next((place for place in (*shorter, f"{prefix}{name_in_model}", name_in_model) if place in parameters), None)
        if place is not None:
            stored_by_name[place] = name
    return stored_by_name
