"""Finds fused expert parameters that a checkpoint stores as separate tensors for each expert, as most
mixture-of-experts models do.

In transformers' models they are one parameter ``experts.gate_up_proj`` ``[n, 2 width, in]`` (an expert's gate
above its up projection) and ``experts.down_proj`` ``[n, in, width]``, which saving splits.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from ..io import TensorInfo

_EXPERT = re.compile(r"(?P<owner>[^\0]{1,400}\.experts)\.(?P<number>[0-9]{1,5})\.(?P<leaf>\w{1,20})\.weight")
_FUSED = {
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("w1", "w3"): "gate_up_proj",
    ("down_proj",): "down_proj",
    ("w2",): "down_proj",
}
"""Maps the names of an expert's layers to that of the fused parameter."""
_RENAMED = {"block_sparse_moe": "mlp"}
"""Maps the checkpoint's name of the module with experts and router to the model's."""


def stored_as(name: str) -> str | None:
    """Returns the older name that checkpoints use for a parameter of a mixture of experts, or None.

    Example:
        >>> stored_as("layers.0.mlp.gate.weight"), stored_as("layers.0.q_proj.weight")
        ('layers.0.block_sparse_moe.gate.weight', None)
    """
    return next(
        (
            name.replace(f".{ours}.", f".{theirs}.")
            for theirs, ours in _RENAMED.items()
            if f".{ours}." in name
        ),
        None,
    )


class ExpertStack(NamedTuple):
    """A fused parameter ``[n, out, in]``; ``parts`` lists, for each of its matrices, the tensors that store
    its rows, in order.
    """

    name: str
    dtype: str
    shape: tuple[int, int, int]
    parts: tuple[tuple[str, ...], ...]


def find_stacks(stored: Mapping[str, TensorInfo]) -> dict[str, ExpertStack]:
    """Returns the fused parameters that a checkpoint's tensors form, by the model's names.

    Example:
        >>> leaves = [f"{number}.{leaf}" for number in range(2) for leaf in ("w1", "w2", "w3")]
        >>> names = [f"layers.0.block_sparse_moe.experts.{leaf}.weight" for leaf in leaves]
        >>> stacks = find_stacks({name: TensorInfo(name, "F32", (4, 3), 0, 48) for name in names})
        >>> stacks["layers.0.mlp.experts.gate_up_proj"].shape
        (2, 8, 3)
    """
    leaves: dict[str, dict[str, dict[int, TensorInfo]]] = defaultdict(lambda: defaultdict(dict))
    for name, info in stored.items():
        match = _EXPERT.fullmatch(name)
        if match is not None and len(info.shape) == 2:
            leaves[match["owner"]][match["leaf"]][int(match["number"])] = info
    stacks = {}
    for owner, layers in leaves.items():
        model = next(
            (
                owner.removesuffix(f"{theirs}.experts") + f"{ours}.experts"
                for theirs, ours in _RENAMED.items()
                if owner.endswith(f"{theirs}.experts")
            ),
            owner,
        )
        # The gate and up projections form one fused parameter, the down projection another.
        for members, fused in _FUSED.items():
            stack = _stack(f"{model}.{fused}", [layers.get(leaf, {}) for leaf in members])
            if stack is not None and stack.name not in stored:
                stacks[stack.name] = stack
    return stacks


def _stack(name: str, members: list[dict[int, TensorInfo]]) -> ExpertStack | None:
    """Returns the fused parameter that these layers of all experts form; None unless they are complete and of
    equal dtype and shape.
    """
    count = len(members[0])
    if not count or any(experts.keys() != set(range(count)) for experts in members):
        return None
    kinds = [{(info.dtype, info.shape) for info in experts.values()} for experts in members]
    if any(len(kind) > 1 for kind in kinds):
        return None
    (dtype, (_, columns)), *_ = shapes = [next(iter(kind)) for kind in kinds]
    if any(other != dtype or shape[1] != columns for other, shape in shapes):
        return None
    rows = sum(shape[0] for _, shape in shapes)
    return ExpertStack(
        name,
        dtype,
        (count, rows, columns),
        tuple(tuple(experts[number].name for experts in members) for number in range(count)),
    )
