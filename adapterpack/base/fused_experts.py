"""Fused experts whose checkpoint holds every expert in tensors of its own, as those of most mixtures of experts do.

transformers' models hold them as one parameter ``experts.gate_up_proj`` ``[n, 2 width, in]`` (an expert's gate above its up projection) and
``experts.down_proj`` ``[n, in, width]``, and cut them when they are saved.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from ..io.safetensors import TensorInfo

_EXPERT = re.compile(r"(?P<owner>[^\0]{1,400}\.experts)\.(?P<number>[0-9]{1,5})\.(?P<leaf>\w{1,20})\.weight")
_FUSED = {("gate_proj", "up_proj"): "gate_up_proj", ("w1", "w3"): "gate_up_proj", ("down_proj",): "down_proj", ("w2",): "down_proj"}
"""What an expert's layers are called -> what they are together."""
_RENAMED = {"block_sparse_moe.experts": "mlp.experts"}
"""How a checkpoint calls what holds the experts -> how the model does."""


class Stack(NamedTuple):
    """A fused parameter ``[n, out, in]``; ``parts`` names for each of its matrices the tensors that hold its rows, one after the other."""

    name: str
    dtype: str
    shape: tuple[int, int, int]
    parts: tuple[tuple[str, ...], ...]


def find(stored: Mapping[str, TensorInfo]) -> dict[str, Stack]:
    """The fused parameters that the tensors of a checkpoint make up, by the name that the model has for each.

    Example:
        >>> names = [f"layers.0.block_sparse_moe.experts.{i}.{leaf}.weight" for i in range(2) for leaf in ("w1", "w2", "w3")]
        >>> found = find({name: TensorInfo(name, "F32", (4, 3), 0, 48) for name in names})
        >>> found["layers.0.mlp.experts.gate_up_proj"].shape
        (2, 8, 3)
    """
    leaves: dict[str, dict[str, dict[int, TensorInfo]]] = defaultdict(lambda: defaultdict(dict))
    for name, info in stored.items():
        match = _EXPERT.fullmatch(name)
        if match is not None and len(info.shape) == 2:
            leaves[match["owner"]][match["leaf"]][int(match["number"])] = info
    found = {}
    for owner, held in leaves.items():
        model = next((owner.removesuffix(theirs) + ours for theirs, ours in _RENAMED.items() if owner.endswith(theirs)), owner)
        for members, fused in _FUSED.items():
            stack = _stack(f"{model}.{fused}", [held.get(leaf, {}) for leaf in members])
            if stack is not None and stack.name not in stored:
                found[stack.name] = stack
    return found


def _stack(name: str, members: list[dict[int, TensorInfo]]) -> Stack | None:
    count = len(members[0])
    if not count or any(each.keys() != set(range(count)) for each in members):
        return None
    kinds = [{(info.dtype, info.shape) for info in each.values()} for each in members]
    if any(len(kind) > 1 for kind in kinds):
        return None
    (dtype, (_, columns)), *_ = shapes = [next(iter(kind)) for kind in kinds]
    if any(other != dtype or shape[1] != columns for other, shape in shapes):
        return None
    rows = sum(shape[0] for _, shape in shapes)
    return Stack(name, dtype, (count, rows, columns), tuple(tuple(each[number].name for each in members) for number in range(count)))
