"""Checks that the sites that a pack changes exist: in a list of known modules, or in a base's headers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from ..adapter_methods import PROMPT, matrix_shape
from ..base import compatibility
from ..base.checkpoint import Checkpoint
from ..base.site_kinds import kinds_on
from ..errors import BaseMismatch, SiteNotFound, nearest
from ..manifest.described import Described
from ..manifest.manifest import Group


def require_sites(pack: Described, paths: Mapping[str, Any], where: object) -> None:
    """Checks that every module the pack changes is among ``known``.

    Raises:
        SiteNotFound: one is not, or none is; the nearest name is given.
    """
    for group in pack.manifest.groups:
        if group.role != "shared" and group.path != PROMPT and group.path not in paths:
            raise SiteNotFound(f"pack '{pack.name}' changes a site that is not there", where=where, found=group.path,
                               remedy=nearest(group.path, paths))


def require_shapes(pack: Described, base: Checkpoint, renamed: bool) -> None:
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
        require_shape(pack, replace(group, kind=kinds.get(group.path) or group.kind),
                      base.weight_shape(group.path, group.weight), base.where)


def require_shape(pack: Described, group: Group, stored: tuple[int, ...], where: object) -> None:
    """Checks that a weight of the ``stored`` shape is one that a group can change.

    Raises:
        BaseMismatch: it is another kind of layer's, or has another shape.
    """
    shape, features = matrix_shape(group.kind, stored), (group.out_features, group.in_features)
    place, bound = f"{where}, {group.path}", any(compatibility.recorded_fingerprint(pack.manifest.base))
    if shape is None:
        unread = "use the model that the adapter was trained on; if this is it: " \
                 f"PEFT has {pack.method_of(group).name} for such a layer, in a form that is not read here, so merge it with PEFT"
        raise BaseMismatch("the base has another kind of layer at this site", where=place, expected=f"a layer of kind '{group.kind}'",
                           found=f"a weight of shape {stored}", remedy=_ITS_BASE if bound else unread)
    if any(expected not in {None, actual} for expected, actual in zip(features, shape, strict=True)):
        raise BaseMismatch("a site has another shape in this base", where=place, expected=f"{features} of kind '{group.kind}'", found=shape,
                           remedy=_ITS_BASE if bound else "use the model that the adapter was trained on")


_ITS_BASE = "use the base that the pack names"
