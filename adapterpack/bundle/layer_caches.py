"""Tells which caches of a decoder's graph grow with the tokens, and makes empty ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..adapter_methods import Tensors
from ..tasks import Arrays
from .manifest import PAST


def growing_axis(name: str, shape: Sequence[object]) -> int | None:
    """Returns the axis of a cache that has a position for each token; None for a state of fixed size, which
    every pass replaces.

    Example:
        >>> growing_axis("past_key_values.0.key", ["batch", 2, "past", 8])
        2
        >>> growing_axis("past_key_values.1.conv_state", ["batch", 32, 3]) is None
        True
    """
    if name.endswith((".key", ".value")):
        return 2
    return next((axis for axis in range(1, len(shape)) if not isinstance(shape[axis], int)), None)


def layer_of(name: str) -> int:
    """Returns the number of the layer that a cache belongs to.

    Example:
        >>> layer_of("past_key_values.3.key"), layer_of("present.4.value")
        (3, 4)
    """
    return int(name.rsplit(".", 2)[1])


def replaced_states(inputs: Mapping[str, Any]) -> list[str]:
    """Returns the names of the states of fixed size among a graph's inputs."""
    return [
        name
        for name, value in inputs.items()
        if name.startswith(PAST) and growing_axis(name, value.shape) is None
    ]


def empty_caches(inputs: Mapping[str, Any], rows: int, width: int = 0) -> Arrays:
    """Returns the caches of a graph with these inputs before the first token of ``rows`` rows: ``width``
    positions of zeros, and states of zeros.
    """
    caches = {}
    for name, value in inputs.items():
        if name.startswith(PAST):
            axis = growing_axis(name, value.shape)
            extents = [width if at == axis else extent for at, extent in enumerate(value.shape)]
            caches[name] = np.zeros((rows, *extents[1:]), np.float32)
    return caches


def past_length(caches: Tensors) -> int | None:
    """Returns how many positions the caches among a pass's inputs have; None if none of them grows."""
    # an array does not say which of its axes grows: one of keys and values does
    return next(
        (array.shape[2] for name, array in caches.items() if name.startswith(PAST) and name.endswith(".key")),
        None,
    )
