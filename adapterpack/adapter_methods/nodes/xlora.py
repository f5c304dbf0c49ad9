"""X-LoRA: weights the experts by a classifier of the hidden states of a first pass (Buehler and Buehler 2024,
arXiv 2402.07148, section 2).

    f(x) = base(x) + s * sum_i g_i D_i x,   g = softmax(classifier(h) / T)
    h = last hidden states of the base alone

The model has one classifier, linear or with ReLU between its layers; ``layerwise`` makes it compute separate
weights for every adapted layer. The experts and the base are frozen, and no gradient flows through the first
pass.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from msgspec import Meta

from .. import (
    Array,
    Arrays,
    FiniteFloat,
    NonNegativeInt,
    Params,
    PositiveFloat,
    Random,
    Shape,
    Shapes,
    softmax,
)
from ..core.routers import Precomputed, keep_largest, softmax_of_largest
from ..forms.blocks import relu
from .base import NodeKind, NodePart, NodeSettings, Parts, mix, scale_part
from .registry import NODES


@dataclass(frozen=True)
class XLoRA(NodeSettings):
    """The classifier: ``depth`` linear layers with inner width ``size``, on hidden states of width ``hidden``
    (0: the base's own).

    ``scale`` multiplies all weights. With ``top_k`` only the largest weights count and the others become
    zero; ``softmax_topk`` then normalises them to a sum of one.
    """

    hidden: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    depth: Annotated[int, Meta(ge=1, le=32)] = 1
    size: Annotated[int, Meta(ge=1, le=1 << 20)] = 2048
    layerwise: bool = False
    softmax: bool = True
    temperature: PositiveFloat = 1.0
    top_k: NonNegativeInt = 0
    softmax_topk: bool = False
    scale: FiniteFloat = 1.0


def _shared_shapes(settings: XLoRA, count: int, layers: int) -> Shapes:
    outputs = count * layers if settings.layerwise else count
    widths = [settings.hidden, *[settings.size] * (settings.depth - 1), outputs]
    shapes: dict[str, Shape] = {}
    for number, (inner, outer) in enumerate(itertools.pairwise(widths)):
        shapes |= {f"weight_{number}": (outer, inner), f"bias_{number}": (outer,)}
    return shapes


def _make_shared(settings: XLoRA, count: int, layers: int, rng: Random) -> Arrays:
    """Draws uniformly within ``1 / sqrt(width)``, as torch initialises linear layers."""
    shapes = _shared_shapes(settings, count, layers)
    bounds = {name: 1 / math.sqrt(shapes[name.replace("bias", "weight")][1]) for name in shapes}
    return {
        name: rng.uniform(-bounds[name], bounds[name], shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def weigh(settings: XLoRA, tensors: Params, hidden: Array, layer: int, layers: int) -> Array:
    """Computes the weights at one layer, ``[batch, positions, experts]``, from the last hidden states
    ``[batch, positions, hidden]``.
    """
    value = hidden
    for number in range(settings.depth):
        value = value @ tensors[f"weight_{number}"].T + tensors[f"bias_{number}"]
        if number < settings.depth - 1:
            value = relu(value)
    if settings.layerwise:
        count = value.shape[-1] // layers
        value = value[..., layer * count : (layer + 1) * count]
    if settings.softmax:
        value = softmax(value / settings.temperature)
    top_k = settings.top_k or value.shape[-1]
    return softmax_of_largest(value, top_k) if settings.softmax_topk else keep_largest(value, top_k, 0)


def _join(settings: XLoRA, parts: Parts, tensors: Params) -> NodePart | None:
    part = mix(parts, lambda down, up, ranks: Precomputed(tensors.get("weights")), absent=True)
    return None if part is None else scale_part(part, settings.scale)


xlora = NODES.register(
    NodeKind(
        name="xlora",
        summary=(
            "experts mixed token by token, by a trained classifier of the base's last hidden states; two "
            "passes"
        ),
        paper="https://arxiv.org/abs/2402.07148",
        formula=(
            "f(x) = base(x) + s sum_i g_i D_i x,  g = softmax(classifier(h) / T),  h = last hidden states "
            "of the base"
        ),
        settings=XLoRA,
        join=_join,
        unfoldable="its weights come from a first pass over the same tokens",
        torch_only="its weights come from a first pass over the same tokens",
        one_pass=True,
        trained=True,
        shared=_shared_shapes,
        made_shared=_make_shared,
        weigh=weigh,
        examples=(
            "xlora(a, b, c)",
            "xlora(a, b, c, depth=3, size=9, layerwise=true, top_k=2)",
            "sum(0.5*a, xlora(b, c, top_k=1, softmax_topk=true))",
        ),
    )
)
