"""The kinds that the layers of an adapter have in a base."""

from __future__ import annotations

from collections.abc import Callable

from ..adapter_methods.core.layouts import CONVOLUTIONS, LAYOUTS, LINEAR, is_stacked, matrix_shape
from ..errors import SiteNotFound
from ..manifest.manifest import Group
from .checkpoint import Checkpoint
from .linear_layers import has_transposed


def kind_on(base: Checkpoint, group: Group, may_be: Callable[[str], bool]) -> str | None:
    """The kind that the layer of a group has in ``base``; None where nothing shows which way round a linear
    layer is stored.

    ``may_be`` is as in :func:`kind_of_shape`. A group that is no linear layer's keeps its kind, and one whose
    weight is not there.
    """
    if group.role == "adapter" and is_stacked(group.kind):
        return _stack_on(base, group, may_be)
    if group.role != "adapter" or group.kind not in LINEAR:
        return group.kind
    weight = base.weight_name(group.path, group.weight) or base.tied_to(group.path)
    if weight is None:
        return group.kind
    if len(stored := base.tensors[weight].shape) != 2:
        return kind_of_shape(stored, group, may_be)
    return base.linear_kind(weight) or (None if has_transposed(base.kinds_by_name) else group.kind)


_STACKS = tuple(kind for kind in LAYOUTS if is_stacked(kind))
_TURNED_BY = frozenset({"aria", "aria_text", "gpt_oss", "openai_privacy_filter"})
"""Types of models whose experts transformers says to be transposed."""


def _stack_on(base: Checkpoint, group: Group, may_be: Callable[[str], bool]) -> str | None:
    """The kind of a stack, by the shape of one of its matrices; a square one is stored as the models of that
    type store theirs.
    """
    try:
        stored = base.weight_shape(group.path, group.weight)
    except SiteNotFound:
        return group.kind
    wanted = group.out_features, group.in_features
    fitting = [
        kind
        for kind in _STACKS
        if (kind == group.kind or may_be(kind)) and matrix_shape(kind, stored) == wanted
    ]
    if len(fitting) < 2 or not (model_type := base.config.get("model_type")):
        return fitting[0] if len(fitting) == 1 else group.kind if not fitting else None
    return "turned_experts" if model_type in _TURNED_BY else "experts"


def kind_of_shape(stored: tuple[int, ...], group: Group, may_be: Callable[[str], bool]) -> str:
    """The kind of the layer of a group by the shape of its weight alone: a convolution, where it has the axes
    of one and the group's tensors ``may_be`` those of one.
    """
    if group.role != "adapter" or group.kind not in LINEAR:
        return group.kind
    return next(
        (kind for kind in CONVOLUTIONS if may_be(kind) and matrix_shape(kind, stored) is not None), group.kind
    )
