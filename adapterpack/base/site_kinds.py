"""The kinds that the linear layers of an adapter have in a base."""

from __future__ import annotations

from collections.abc import Iterable

from ..adapter_methods.core.layouts import LINEAR
from ..manifest.manifest import Group
from .checkpoint import Checkpoint
from .linear_layers import has_transposed


def kinds_on(base: Checkpoint, groups: Iterable[Group]) -> dict[str, str | None]:
    """Path -> the kind that its layer has in ``base``, for the groups of linear layers: as the base shows it, and the group's own in a base
    that shows no transposed layer."""
    found = {}
    for group in groups:
        if group.role != "adapter" or group.kind not in LINEAR:
            continue
        weight = base.weight_name(group.path, group.weight) or base.tied_to(group.path)
        if weight is not None:
            found[group.path] = base.linear_kind(weight) or (None if has_transposed(base.kinds_by_name) else group.kind)
    return found
