"""What a model hears: the name, the shape and the axes of its input, as its class and its config say."""

from __future__ import annotations

import math
from inspect import signature
from typing import Any, NamedTuple

from ..adapter_methods import Tensors

SOUNDS = ("input_values", "input_features")
"""The names of inputs that hold sound: samples or features. A model has one of them."""
FRAMES = "frames"
"""The output ``[rows, 1]`` of a graph that answers for every frame: how many frames are a row's own."""
_FRAMES = 8
"""How many frames are a unit, where a model hears features of any length; more than a model joins to one."""


class Sound(NamedTuple):
    """One row is of ``shape``. With a ``unit`` its first axis may be of any length, and examples have a
    multiple of the unit, enough for several positions; ``masked`` says that a mask tells padding from sound.
    """

    name: str
    shape: tuple[int, ...]
    unit: int = 0
    masked: bool = False

    @property
    def axes(self) -> tuple[str | None, ...]:
        """The names of the axes of a batch."""
        return ("batch", "sequence" if self.unit else None, *[None] * (len(self.shape) - 1))

    def of(self, units: int) -> tuple[int, ...]:
        """Returns the shape of a row of so many units."""
        return (self.unit * units, *self.shape[1:]) if self.unit else self.shape


def sound_of(model: Any) -> Sound | None:
    """Returns what a torch model hears; None if it hears nothing, or its config does not say its form.

    Where the first convolution is normalised over time (``feat_extract_norm: group``), padding changes every
    position, and where convolutions over positions follow each other (``conv_pos_kernel_size``) it changes
    those near it. Such a model is never given a mask: its rows are of one length.
    """
    name = getattr(model, "main_input_name", None)
    whole = getattr(model, "config", None)
    config = getattr(whole, "encoder_config", whole)
    bands = getattr(config, "num_mel_bins", None) or getattr(config, "feature_projection_input_dim", None)
    strides = getattr(config, "conv_stride", None)
    positions = getattr(config, "max_source_positions", None)
    frames = getattr(config, "max_length", None)
    if name not in SOUNDS:
        return None
    masked = "attention_mask" in signature(model.forward).parameters
    if name == "input_values" and bands is None and isinstance(strides, list | tuple):
        unit = 4 * math.prod(strides)
        blind = getattr(config, "feat_extract_norm", None) == "group" or hasattr(
            config, "conv_pos_kernel_size"
        )
        return Sound(name, (unit,), unit, masked and not blind)
    if not isinstance(bands, int):
        return None
    if name == "input_values":
        return Sound(name, (frames, bands)) if isinstance(frames, int) else None
    if isinstance(positions, int) and not hasattr(config, "feature_projection_input_dim"):
        return Sound(name, (bands, 2 * positions))
    return Sound(name, (_FRAMES, bands), _FRAMES, masked)


def positions_of(inputs: Tensors) -> int:
    """Returns about how many positions a pass takes for the inputs of a sound: one for 20 ms."""
    values = next(inputs[name] for name in SOUNDS if name in inputs)
    return int(values.shape[1] // 320 if values.ndim == 2 else max(values.shape[1:]) // 2)
