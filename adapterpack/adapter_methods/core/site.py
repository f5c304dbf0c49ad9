"""A site: one place in a model that an adapter changes, and the calibration data measured there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .operators import Array

Params = Mapping[str, Array]
PROMPT = "@prompt"
"""The path of the one site that a prompt has: no module can have it."""


class Calibration(NamedTuple):
    """Statistics measured at a site while the base ran over sample data.

    ``moment``: ``X^T X / rows`` of the inputs, ``[in, in]``; ``gradient``: the mean gradient of the loss by
    the weight, ``[out, in]``; ``fisher``: the mean over batches of that gradient's square, ``[out, in]``.
    """

    moment: np.ndarray | None = None
    gradient: np.ndarray | None = None
    fisher: np.ndarray | None = None


@dataclass(frozen=True)
class Site:
    """One place in a model that an adapter changes.

    ``path`` is the literal path of the module, or of the parameter itself where a bare one is adapted;
    ``kind`` says how its weight is stored (:mod:`~.layouts`), which a method never sees: for it the weight is
    ``[out, in]``. ``kernel`` is that of a convolution, whose ``in_features`` counts it, where PEFT's form of
    the tensors needs it; ``stack`` counts the matrices of a parameter that holds several of them, and a
    convolution's groups where its adapter has none.

    ``weight`` (``[out, in]``) and ``base_bias`` (``[out]``, or None) are given only to methods whose
    trait ``reads_weight`` is set, and with ``calibration`` to an ``init`` that needs them; an ``init`` also
    gets ``shared``, with which the parameters begin that all sites have in common. A width is 0 where it is
    not known: a file of another library need not say both.
    """

    path: str
    in_features: int
    out_features: int
    kind: str = "linear"
    bias: bool = False
    kernel: tuple[int, ...] = field(default=(), compare=False)
    stack: int = 1
    weight: Array | None = field(default=None, compare=False, repr=False)
    base_bias: Array | None = field(default=None, compare=False, repr=False)
    calibration: Calibration | None = field(default=None, compare=False, repr=False)
    shared: Params = field(default_factory=dict, compare=False, repr=False)
