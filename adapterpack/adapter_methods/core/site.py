"""A site: one place in a model that an adapter changes, and the calibration data measured there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .operators import Array

Random = np.random.Generator
Params = Mapping[str, Array]
"""Name of a parameter -> its value, an array of any library."""
Arrays = dict[str, np.ndarray]
"""Name of a parameter -> its value as a numpy array."""
Tensors = Mapping[str, np.ndarray]
"""The same, for a function that only reads them."""
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
"""Name of a parameter -> its shape."""


def shapes_of(params: Params) -> dict[str, Shape]:
    """Returns the shapes of arrays by name."""
    return {name: value.shape for name, value in params.items()}


PROMPT = "@prompt"
"""The path of the only site of a prompt; no module can have this path."""


class Calibration(NamedTuple):
    """Statistics measured at a site while the base model processed sample data.

    ``moment``: ``X^T X / rows`` of the inputs, ``[in, in]``; ``gradient``: the mean gradient of the loss with
    respect to the weight, ``[out, in]``; ``fisher``: the mean over batches of that gradient's square, ``[out,
    in]``.
    """

    moment: np.ndarray | None = None
    gradient: np.ndarray | None = None
    fisher: np.ndarray | None = None


@dataclass(frozen=True)
class Site:
    """One place in a model that an adapter changes.

    ``path`` is the literal path of the module, or of the parameter if a bare parameter is adapted. ``kind``
    says how the weight is stored (:mod:`~.layouts`); a method never sees that, for it the weight is always
    ``[out, in]``. ``kernel`` is the kernel of a convolution, which ``in_features`` includes, given where
    PEFT's form of the tensors needs it. ``stack`` is the number of matrices in a stacked parameter, or the
    number of groups of a convolution whose adapter has none.

    ``weight`` (``[out, in]``) and ``base_bias`` (``[out]``, or None) are given only to methods with the trait
    ``reads_weight``, and together with ``calibration`` to an ``init`` that needs them. ``init`` also gets
    ``shared``, the initial values of the parameters that all sites share. A width is 0 if it is unknown,
    because a file of another library need not contain both.
    """

    path: str
    in_features: int
    out_features: int
    kind: str = "linear"
    bias: bool = False
    kernel: Shape = field(default=(), compare=False)
    stack: int = 1
    weight: Array | None = field(default=None, compare=False, repr=False)
    base_bias: Array | None = field(default=None, compare=False, repr=False)
    calibration: Calibration | None = field(default=None, compare=False, repr=False)
    shared: Params = field(default_factory=dict, compare=False, repr=False)
