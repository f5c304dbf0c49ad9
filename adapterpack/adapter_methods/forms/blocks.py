"""The normal form of methods that add a bottleneck's output to a block's output (kind "activation"), and the
base class of their configs.

    h' = h + up(act(down(norm(z))))

``h`` is the block's output ``[..., width]``; ``z`` is ``h``, or the block's input (the parallel form, He et
al. 2022, arXiv 2110.04366, section 3.2). A weight cannot hold a nonlinear branch, so nothing here folds;
training, exporting and serving all use these few fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import numpy as np

from .. import (
    FOR_TRAINING,
    Array,
    FiniteFloat,
    Operator,
    Site,
    SiteConfig,
    Traits,
    array_namespace,
    is_number,
    pattern_of,
)

EPSILON = 1e-5
"""Keeps the norm's division away from zero."""

TRAITS = Traits(row_separable=False, quantizable=False, layers=("block",))
"""The traits that all methods of this kind share."""


class Norm(NamedTuple):
    """Layer normalization over the last axis: ``(z - mean) / sqrt(var + EPSILON) * weight + bias``;
    ``weight`` and ``bias`` are ``[width]``.
    """

    weight: Array
    bias: Array

    def apply(self, z: Array) -> Array:
        """Normalizes ``z`` of shape ``[..., width]``."""
        xp = array_namespace(z, self.weight)
        centred = z - xp.mean(z, axis=-1, keepdims=True)
        variance = xp.mean(centred * centred, axis=-1, keepdims=True)
        return centred / xp.sqrt(variance + EPSILON) * self.weight + self.bias


class BlockForm(NamedTuple):
    """The normal form of one adapter at one block; ``None`` means absent.

    Shapes: ``down`` ``[r, width]``, ``down_bias`` ``[r]``, ``up`` ``[width, r]``, ``up_bias`` ``[width]``;
    ``up`` and its bias include the scale. ``act`` is a key of :data:`ACTIVATIONS`. ``reads_input``: the
    branch reads the block's input instead of its output.
    """

    down: Operator
    up: Operator
    down_bias: Array | None = None
    up_bias: Array | None = None
    act: str = "identity"
    norm: Norm | None = None
    reads_input: bool = False


def evaluate_block(
    form: BlockForm, h: Array, x: Array | None = None, drop: Callable[[Array], Array] | None = None
) -> Array:
    """Computes ``h + up(act(down(norm(z))))`` for ``h`` of shape ``[..., width]``, and ``x`` of the same
    shape if the form reads the input.

    ``drop`` is the dropout that training applies to the added output.

    Example:
        >>> from adapterpack.adapter_methods import Dense
        >>> form = BlockForm(down=Dense(np.array([[1.0, -1.0]])), up=Dense(np.array([[2.0], [0.0]])),
        ...     act="relu")
        >>> evaluate_block(form, np.array([[3.0, 1.0], [1.0, 3.0]]))
        array([[7., 1.],
               [1., 3.]])
    """
    z = x if form.reads_input else h
    inner = form.down.apply(z if form.norm is None else form.norm.apply(z))
    inner = ACTIVATIONS[form.act](inner if form.down_bias is None else inner + form.down_bias)
    added = form.up.apply(inner)
    added = added if form.up_bias is None else added + form.up_bias
    return h + (added if drop is None else drop(added))


def relu(x: Array) -> Array:
    """``max(x, 0)``."""
    xp = array_namespace(x)
    return xp.where(x > 0, x, xp.zeros_like(x))


def _tanh(x: Array) -> Array:
    return array_namespace(x).tanh(x)


def _silu(x: Array) -> Array:
    return 0.5 * x * (1 + _tanh(0.5 * x))  # x sigmoid(x), by a tanh that cannot overflow


def _gelu(x: Array) -> Array:
    xp = array_namespace(x)
    inner = x * math.sqrt(0.5)
    # numpy has no erf
    erf = xp.erf(inner) if hasattr(xp, "erf") else np.vectorize(math.erf, otypes=[inner.dtype])(inner)
    return 0.5 * x * (1 + erf)


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + _tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "relu": relu,
    "tanh": _tanh,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
"""Name -> the activation between ``down`` and ``up``. Each maps zero to zero, so that a branch can be padded
with zeros.
"""

ALIASES = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "linear": "identity"}
"""Other names of activations -> the names in :data:`ACTIVATIONS`."""

ENTRIES = {
    "attention.output.dense": "attention.self.query",
    "output.dense": "intermediate.dense",
    "fc2": "fc1",
}
"""For a block that is not a module of its own: end of the path of the layer that computes its output -> end
of the path of the layer that reads its input.
"""


@dataclass(frozen=True, kw_only=True)
class BlockConfig(SiteConfig):
    """The settings that bottleneck methods share: where the branch goes, how narrow it is and what it reads.

    ``targets`` may also be ``all-layers`` (the output of every repeated layer, which is the residual stream),
    ``all-ffn``, ``all-attention``, or ``all-blocks`` (attention and feed-forward): the output of a sub-layer
    before the residual and the norm. ``source`` is ``output``, ``input``, or the module whose input the
    branch reads, as a name that replaces the last components of the site's path. The bottleneck is ``width //
    reduction`` wide, and at least 1.

    Example:
        >>> BlockConfig(source="input").at("encoder.layer.0.output.dense").source
        'encoder.layer.0.intermediate.dense'
        >>> BlockConfig(source="input", reduction_pattern={"0.mlp": 4}).at("layers.0.mlp").reduction
        4
    """

    targets: str | tuple[str, ...] = field(default="all-layers", metadata=FOR_TRAINING)
    reduction: float = 16
    act: str = "relu"
    source: str = "output"
    scaling: FiniteFloat = 1.0
    reduction_pattern: Mapping[str, float] = pattern_of("reduction")

    def __post_init__(self) -> None:
        super().__post_init__()
        for value in (self.reduction, *self.reduction_pattern.values()):
            if not is_number(value) or value < 1:
                raise ValueError(f"reduction must be a number of at least 1, not {value!r}")
        act = ALIASES.get(self.act, self.act)
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, not {self.act!r}")
        if not isinstance(self.source, str) or not self.source:
            raise ValueError(f"source must be output, input or the name of a module, not {self.source!r}")
        object.__setattr__(self, "act", act)

    def at(self, path: str) -> Self:
        """Returns the config for one site, with its reduction and the full path of the module whose input is
        read.
        """
        return replace(super().at(path), source=entry_of(self.source, path))

    @property
    def scale(self) -> float:
        """The number that multiplies the branch."""
        return self.scaling

    @property
    def reads_input(self) -> bool:
        """Whether the branch is parallel to the block instead of after it."""
        return self.source != "output"

    def width(self, site: Site) -> int:
        """Returns how wide the bottleneck is at a site."""
        return max(1, int(site.out_features // self.reduction))


def entry_of(source: str, path: str) -> str:
    """Returns what a branch at ``path`` reads: ``output``, ``input`` (of the module at ``path`` itself), or
    the path of the module whose input it reads.

    Example:
        >>> entry_of("input", "layers.0.mlp"), entry_of("up", "layers.0.mlp.down")
        ('input', 'layers.0.mlp.up')
    """
    if source == "output":
        return source
    end = next((end for end in ENTRIES if f".{path}".endswith(f".{end}")), None)
    if source == "input":
        return source if end is None else path.removesuffix(end) + ENTRIES[end]
    kept = path.split(".")[: -len(source.split("."))]
    return ".".join([*kept, source])
