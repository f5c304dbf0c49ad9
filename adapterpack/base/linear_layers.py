"""Determines in which orientation a base stores the weights of linear layers: ``[out, in]`` as torch, or
``[in, out]`` as transformers' ``Conv1D``.

A pack that was saved from a model records it. A folder written by PEFT does not: PEFT keeps a single flag,
the last layer's, and some methods none. The meaning of an adapter does not depend on it, since methods see
matrices ``[out, in]``, but what a merge writes does, and for a square weight no shape would reveal a mistake.
The base's biases reveal it: they have one element per output.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..io import TensorInfo
from .tensor_rows import module_parameter

_CONV1D = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})
"""The names of ``Conv1D`` layers in all transformers models that have any; other models have linear layers
with these names.
"""


def tell_kind(tensors: Mapping[str, TensorInfo], weight: str) -> str | None:
    """Returns the kind of a linear layer as its shapes reveal it (a ``Conv1D`` always has a bias); None if
    they do not.

    Example:
        >>> from adapterpack.io.safetensors import TensorInfo
        >>> shapes = {"c_fc.weight": (8, 32), "c_fc.bias": (32,), "q.weight": (8, 8), "k.weight": (8, 8),
        ...     "k.bias": (8,)}
        >>> tensors = {name: TensorInfo(name, "F32", shape, 0, 0) for name, shape in shapes.items()}
        >>> [tell_kind(tensors, f"{name}.weight") for name in ("c_fc", "q", "k")]
        ['transposed', 'linear', None]
    """
    shape = tensors[weight].shape
    bias = tensors.get(module_parameter(weight, "bias"))
    if bias is None:
        return "linear"
    sides = [
        kind
        for kind, outputs in zip(("linear", "transposed"), shape, strict=False)
        if bias.shape == (outputs,)
    ]
    return sides[0] if len(sides) == 1 else None


def kinds_by_name(tensors: Mapping[str, TensorInfo]) -> dict[str, set[str]]:
    """Maps the last part of module paths to the kinds that the shapes of such layers with a bias reveal."""
    found: dict[str, set[str]] = {}
    for name, info in tensors.items():
        stem = name.removesuffix(".weight")
        if (
            stem != name
            and len(info.shape) == 2
            and f"{stem}.bias" in tensors
            and (kind := tell_kind(tensors, name)) is not None
        ):
            found.setdefault(stem.rpartition(".")[2], set()).add(kind)
    return found


def has_transposed(by_name: Mapping[str, set[str]]) -> bool:
    """Whether the shapes of any layer reveal that it is transposed, given the result of
    :func:`kinds_by_name`.
    """
    return any("transposed" in kinds for kinds in by_name.values())


def kind_of(tensors: Mapping[str, TensorInfo], by_name: Mapping[str, set[str]], weight: str) -> str | None:
    """Returns the kind of a linear layer: by its own shapes, else by those of layers with its name, else by
    transformers' names. None if nothing reveals it.
    """
    if (kind := tell_kind(tensors, weight)) is not None:
        return kind
    leaf = weight.removesuffix(".weight").rpartition(".")[2]
    if len(alike := by_name.get(leaf, set())) == 1:
        return next(iter(alike))
    return "transposed" if leaf in _CONV1D and has_transposed(by_name) else None
