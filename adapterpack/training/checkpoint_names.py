"""Where a checkpoint has the weights of modules that transformers renames while it loads them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from .layers.layer import own_modules


def stored_names(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Name of a parameter in ``model`` -> name in the checkpoint whose tensor names are ``stored``, of those that are only renamed.

    What is put together from several tensors, or taken apart, is left out: no one tensor holds it.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    own = {f"{path}.{leaf}".lstrip("."): True for path, module in own_modules(model) for leaf in module._parameters}
    found = {}
    for name in stored:
        mine, converted = rename_source_key(name, renamings, converters, model.base_model_prefix or None, own)
        if converted is None and mine in own:
            found[mine] = name
    return found
