"""Checks that the sites that a pack changes exist: in a list of known modules, or in a base's headers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from msgspec.structs import replace

from ..adapter_methods import PROMPT, Site, matrix_shape
from ..adapter_methods.core.layouts import CONVOLUTIONS, unfoldable
from ..base import compatibility
from ..base.checkpoint import Checkpoint
from ..base.site_kinds import kind_on
from ..errors import BaseMismatch, SiteNotFound, UnknownName, Unsupported, nearest
from ..manifest.described import Described
from ..manifest.manifest import Group
from ..peft.names import alike, limit
from ..tasks.task import NO_TASK, Task, task_named


def require_sites(pack: Described, paths: Mapping[str, Any], where: object) -> None:
    """Checks that every module the pack changes is among ``known``.

    Raises:
        SiteNotFound: one is not, or none is; the nearest name is given.
    """
    for group in pack.manifest.groups:
        if group.role != "shared" and group.path != PROMPT and group.path not in paths:
            raise SiteNotFound(
                f"pack '{pack.name}' changes a site that is not there",
                where=where,
                found=group.path,
                remedy=nearest(group.path, paths),
            )


def task_of(pack: Described) -> Task | None:
    """The task that a pack is for; None where it names none, or one that is not known here."""
    try:
        return task_named(pack.manifest.task.type)
    except UnknownName:
        return None


def require_task(pack: Described, task: Task, accepted: Collection[str] = ()) -> None:
    """Checks that a pack is for ``task``, or for none at all; or for one that is ``accepted`` in its place,
    if it brings no head of that.

    Raises:
        Unsupported: it is for another task.
    """
    name, own = pack.manifest.task.type, task_of(pack)
    if name == NO_TASK or own is task:
        return
    heads = () if own is None else own.heads
    whole = [group.path for group in pack.manifest.groups if group.role == "full"]
    head = next((path for path in whole if path.rpartition(".")[2] in heads), None)
    if name not in accepted or head is not None:
        raise Unsupported(
            "the pack has a head for another task" if head else "the pack is for another task",
            where=", ".join([f"pack '{pack.name}'", *([head] if head else [])]),
            expected=task.name,
            found=name,
            remedy="export it for its own task: adapterpack export BASE PACK -o BUNDLE",
        )


def require_shapes(pack: Described, base: Checkpoint, renamed: bool) -> None:
    """Checks that a base has every weight that a pack changes, in the pack's shape; ``renamed``: its tensors
    may have other names.

    Raises:
        SiteNotFound: it lacks one.
        BaseMismatch: one has another shape.
    """
    kinds = kinds_on(base, pack)
    for group in pack.manifest.groups:
        if group.role != "adapter" or pack.method_of(group).kind != "weight":
            continue
        if renamed and base.weight_name(group.path, group.weight) is None:
            modules = [name.removesuffix(".weight") for name in base.tensors]
            raise SiteNotFound(
                "a tensor that the pack changes has another name in this variant of the base, and no "
                "path leads to it",
                where=f"{base.where}, {group.path}",
                found=group.weight or f"{group.path}.weight",
                remedy=f"use the checkpoint that the pack names; {nearest(group.path, modules)}",
            )
        require_shape(
            pack,
            replace(group, kind=kinds.get(group.path) or group.kind),
            base.weight_shape(group.path, group.weight),
            base.where,
        )


_UNSHOWN = ({"conv", "grouped_conv"}, {"linear", "table"})
"""Kinds whose weights have the same shapes: whether a convolution has groups, or a matrix is looked up, only
the model says.
"""


def may_be(pack: Described, group: Group, kind: str) -> bool:
    """Whether the layer of a group may as well be of that ``kind``: in an adapter of PEFT's whose base is not
    known, where PEFT's file tells no difference; or where a checkpoint tells none, either.
    """
    is_open = not any(compatibility.recorded_fingerprint(pack.manifest.base)) or any(
        {group.kind, kind} <= one for one in _UNSHOWN
    )
    return is_open and alike(pack.method_of(group), group.kind, kind, pack.shapes.get(group.path, {}))


def kinds_on(base: Checkpoint, pack: Described) -> dict[str, str | None]:
    """Path -> the kind that the layer of a group has in ``base``: see
    :func:`~adapterpack.base.site_kinds.kind_on`.
    """
    return {
        group.path: kind_on(base, group, partial(may_be, pack, group))
        for group in pack.manifest.groups
        if group.role == "adapter"
    }


def require_certain(pack: Described, group: Group, site: Site) -> None:
    """Checks that what PEFT wrote of a group has one meaning at the layer that is its ``site``; a pack that
    names its base always has.

    Raises:
        Unsupported: it has not; says why.
    """
    if any(compatibility.recorded_fingerprint(pack.manifest.base)):
        return
    if reason := limit(pack.method_of(group), pack.config_at(group), site):
        raise Unsupported(
            reason,
            where=f"pack '{pack.name}', {site.path}",
            found=f"a layer of kind '{site.kind}', kernel {site.kernel}",
            remedy="merge this adapter with the library that made it",
        )


def require_shape(pack: Described, group: Group, stored: tuple[int, ...], where: object) -> None:
    """Checks that a weight of the ``stored`` shape is one that a group can change.

    Raises:
        BaseMismatch: it is another kind of layer's, or has another shape.
    """
    shape, features = matrix_shape(group.kind, stored), (group.out_features, group.in_features)
    place, bound = f"{where}, {group.path}", any(compatibility.recorded_fingerprint(pack.manifest.base))
    if shape is None:
        unread = (
            "use the model that the adapter was trained on; if this is it: "
            f"PEFT has {pack.method_of(group).name} for such a layer, in a form that is not read here, so "
            "merge it with PEFT"
        )
        raise BaseMismatch(
            "the base has another kind of layer at this site",
            where=place,
            expected=f"a layer of kind '{group.kind}'",
            found=f"a weight of shape {stored}",
            remedy=_ITS_BASE if bound else unread,
        )
    kernel = stored[2:] if group.kind in CONVOLUTIONS else ()
    require_certain(pack, group, Site(group.path, shape[1], shape[0], group.kind, kernel=kernel))
    if unfoldable(group.kind):  # the inputs of all groups, of which the weight shows those of one
        features = (features[0], None)
    if any(expected not in {None, actual} for expected, actual in zip(features, shape, strict=True)):
        raise BaseMismatch(
            "a site has another shape in this base",
            where=place,
            expected=f"{features} of kind '{group.kind}'",
            found=shape,
            remedy=_ITS_BASE if bound else "use the model that the adapter was trained on",
        )


_ITS_BASE = "use the base that the pack names"
