"""Sets the weight of an attached adapter: the factor by which its change is multiplied."""

from __future__ import annotations

import math

from torch import nn

from ...errors import ConfigError, Unsupported
from ..layers import Prompts, adapted_layers, require_names, require_unmerged

_LARGEST = 1000.0


def set_weight(model: nn.Module, name: str, weight: float) -> nn.Module:
    """Multiplies what an adapter changes by ``weight``, from now on and wherever it is active: ``y + weight *
    (adapted(y) - y)``.

    Active adapters that add to the outputs of their layers form a weighted sum, as ``compose`` packs with the
    tree ``sum(0.7*a, -0.3*b)``. Others, such as (IA)^3, apply one after the other, each to the result of the
    one before. A weight of 0 switches an adapter off; 1 is the adapter as it was trained. Modules that were
    trained in full, such as a classifier's head, are not scaled. The weight is a setting of the model: a
    saved pack holds the adapter with weight 1.

    Raises:
        UnknownAdapter: the model has no adapter of that name.
        ConfigError: the weight is not a number from -1000 to 1000.
        Unsupported: the adapter has no change that could be scaled (a prompt), or adapters are merged into
            the weights.

    Example:
        >>> import torch
        >>> from adapterpack import LoRA, adapt
        >>> model = adapt(nn.Sequential(nn.Linear(4, 3)), LoRA(r=2), "tickets")
        >>> before = model(torch.ones(1, 4))
        >>> # untrained, it changes nothing
        >>> bool(torch.equal(set_weight(model, "tickets", 0.5)(torch.ones(1, 4)), before))
        True
    """
    require_unmerged(model)
    require_names(model, [name])
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not math.isfinite(weight)
        or abs(weight) > _LARGEST
    ):
        raise ConfigError(
            "the weight of an adapter must be a number",
            where=name,
            expected=f"-{_LARGEST:g} to {_LARGEST:g}",
            found=weight,
        )
    holders = adapted_layers(model, name)
    if any(isinstance(module, Prompts) for module in holders):
        raise Unsupported(
            "a prompt is there or not: it has no change to be multiplied",
            where=name,
            remedy="leave its weight at 1",
        )
    for module in holders:
        module._held[name].weight = float(weight)
    return model
