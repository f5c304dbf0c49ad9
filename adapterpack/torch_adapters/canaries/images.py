"""Counts the positions that an image occupies in the token sequence of a model that reads text and images."""

from __future__ import annotations

from typing import Any

import torch


def features_of(output: Any) -> torch.Tensor:
    """Returns the tensor in the result of ``get_image_features``, which newer versions of transformers wrap
    in an output object.
    """
    while not isinstance(output, torch.Tensor):
        output = output.pooler_output if hasattr(output, "pooler_output") else torch.stack(list(output))
    return output


def positions_of(model: Any, shape: tuple[int, ...]) -> int:
    """Returns how many positions an image ``[channels, height, width]`` occupies. No config says so for every
    architecture, so the model encodes a blank image.
    """
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    with torch.no_grad():
        features = features_of(model.get_image_features(pixel_values=weight.new_zeros((1, *shape))))
    return int(features.numel()) // int(model.config.get_text_config().hidden_size)
