"""Makes a small layer of each kind on which methods are proved: in torch, in numpy and in an ONNX graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from adapterpack.testing import Case, make_layer

EPSILON = 1e-5
"""What a normalisation adds to the variance, in torch and in ONNX by default."""


class Stand(NamedTuple):
    """``make`` builds the layer from ``torch.nn``; ``x`` goes in; ``output`` is what comes out, by a weight
    ``[out, in]`` and a bias.

    ``node`` is the graph: (operator, attributes) of a single node on x, the weight as :attr:`stored` lays it
    out and the bias; or None for a product and a sum.
    """

    make: Callable[[Any, Case], Any]
    x: Callable[[Case], np.ndarray]
    output: Callable[[Any, Any, Any], Any]
    stored: Callable[[np.ndarray], np.ndarray] = lambda weight: weight
    node: tuple[str, dict[str, Any]] | None = None


def _linear(weight: Any, bias: Any, x: Any) -> Any:
    return make_layer(weight, bias)(x)


def _normed(weight: Any, bias: Any, x: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    found = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON) * weight[:, 0]
    return found if bias is None else found + bias


LINEAR = Stand(
    lambda nn, case: nn.Linear(case.layer.in_features, case.layer.out_features, case.layer.bias),
    lambda case: case.x,
    _linear,
)
NORM = Stand(
    lambda nn, case: nn.LayerNorm(case.layer.out_features, EPSILON, bias=case.layer.bias),
    lambda case: np.random.default_rng(3).normal(size=(3, 5, case.layer.out_features)),
    _normed,
    lambda weight: weight[:, 0],
    ("LayerNormalization", {"axis": -1, "epsilon": EPSILON}),
)
TABLE = Stand(
    lambda nn, case: nn.Embedding(case.layer.out_features, case.layer.in_features),
    lambda case: np.arange(15).reshape(3, 5) % case.layer.out_features,  # every row of the table
    lambda weight, bias, x: weight[x],
    node=("Gather", {"axis": 0}),
)
STANDS = {"linear": LINEAR, "block": LINEAR, "norm": NORM, "table": TABLE}
"""The first kind that a method takes -> what stands for it. Prompts and attentions have a decoder instead
(`prompts.py`).
"""


def stand_of(case: Case) -> Stand:
    """What stands for the case's layer."""
    return STANDS[case.method.traits.layers[0]]
