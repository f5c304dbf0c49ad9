"""What a model that reads text beside images makes of an image: features for as many positions as its one token stands for."""

from __future__ import annotations

from typing import Any

import torch


def features_of(found: Any) -> torch.Tensor:
    """The tensor in what ``get_image_features`` gives, which newer versions of transformers wrap."""
    while not isinstance(found, torch.Tensor):
        found = found.pooler_output if hasattr(found, "pooler_output") else torch.stack(list(found))
    return found


def positions_of(model: Any, shape: tuple[int, ...]) -> int:
    """How many positions one image ``[channels, height, width]`` takes: the model alone knows, so it looks at one."""
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    with torch.no_grad():
        found = features_of(model.get_image_features(pixel_values=weight.new_zeros((1, *shape))))
    return int(found.numel()) // int(model.config.get_text_config().hidden_size)
