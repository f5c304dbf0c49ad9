"""Whether the sites that a pack changes are there: in a list of those that are known, or in a base's headers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import BaseMismatch, SiteNotFound, nearest
from ..methods import PROMPT, matrix_shape
from .linear_layers import kinds_on

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .pack import Pack


def require_sites(pack: Pack, known: Mapping[str, Any], where: object) -> None:
    """Checks that every module the pack changes is among ``known``.

    Raises:
        SiteNotFound: one is not, or none is; the nearest name is given.
    """
    for group in pack.manifest.groups:
        if group.role != "shared" and group.path != PROMPT and group.path not in known:
            raise SiteNotFound(f"pack '{pack.name}' changes a site that is not there", where=where, found=group.path,
                               remedy=nearest(group.path, known))


def require_shapes(pack: Pack, base: Checkpoint, renamed: bool) -> None:
    """Checks that a base has every weight that a pack changes, in the pack's shape; ``renamed``: its tensors may have other names.

    Raises:
        SiteNotFound: it lacks one.
        BaseMismatch: one has another shape.
    """
    kinds = kinds_on(base, pack.manifest.groups)
    for group in pack.manifest.groups:
        if group.role != "adapter" or pack.method_of(group).kind != "weight":
            continue
        if renamed and base.weight_name(group.path, group.weight) is None:
            modules = [name.removesuffix(".weight") for name in base.tensors]
            raise SiteNotFound("a tensor that the pack changes has another name in this variant of the base, and no path leads to it",
                               where=f"{base.where}, {group.path}", found=group.weight or f"{group.path}.weight",
                               remedy=f"use the checkpoint that the pack names; {nearest(group.path, modules)}")
        stored, kind = base.weight_shape(group.path, group.weight), kinds.get(group.path) or group.kind
        shape = matrix_shape(kind, stored)
        known = (group.out_features, group.in_features)
        if shape is None or any(mine not in {None, its} for mine, its in zip(known, shape, strict=True)):
            raise BaseMismatch("a site has another shape in this base", where=f"{base.where}, {group.path}",
                               expected=f"{known} of kind '{kind}'", found=shape or stored,
                               remedy="use the base that the pack names")
