"""Determines the kind of layer at each site of a pack in a base, and so whether its weight is stored
transposed. PEFT's folders leave that open; a checkpoint's shapes and names decide it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from msgspec.structs import replace

from ..adapter_methods import (
    CONVOLUTIONS,
    LAYOUTS,
    LINEAR,
    Method,
    Site,
    is_stacked,
    matrix_shape,
    unfoldable,
)
from ..adapter_methods.core.peft_form import leave_open
from ..base import Checkpoint, compatibility, has_transposed
from ..errors import BaseMismatch, SiteNotFound, Unsupported, nearest
from ..manifest import Described, Group
from ..peft.names import limit

_STACKS = tuple(kind for kind in LAYOUTS if is_stacked(kind))
_TRANSPOSED_EXPERTS = frozenset({"aria", "aria_text", "gpt_oss", "openai_privacy_filter"})
"""Model types whose fused experts transformers stores transposed."""
_UNSHOWN = ({"conv", "grouped_conv"}, {"linear", "table"})
"""Kinds whose weights have the same shapes: only the model knows whether a convolution has groups, or a
matrix is an embedding's table.
"""
_ITS_BASE = "use the base that the pack names"
AnyPack = TypeVar("AnyPack", bound=Described)


def match_layers(pack: AnyPack, base: Checkpoint) -> AnyPack:
    """Returns the pack with the kinds that its layers have in ``base``; its manifest and its id do not
    change.

    Raises:
        Unsupported: nothing shows how the base stores a layer, and the pack was not created on that base.
    """
    kinds = kinds_on(base, pack)
    unknown = [path for path, kind in kinds.items() if kind is None]
    if unknown and not any(compatibility.recorded_fingerprint(pack.manifest.base)):
        raise Unsupported(
            "nothing shows which way round the base stores the weight of this layer, and the adapter "
            "does not say it",
            where=f"pack '{pack.name}', {unknown[0]}",
            expected="[out, in] or [in, out]",
            found=f"a square weight of {base.where}",
            remedy=(
                "attach it to the model and save that (adapterpack.attach, adapterpack.save): a pack knows "
                "its layers"
            ),
        )
    changed = {
        group.path: kind
        for group in pack.manifest.groups
        if (kind := kinds.get(group.path)) not in {None, group.kind}
    }
    return dataclasses.replace(pack, kinds=changed) if changed else pack


def kinds_on(base: Checkpoint, pack: Described) -> dict[str, str | None]:
    """Returns path -> the kind of a group's layer in ``base``; None if nothing shows it.

    A group that is not a linear layer or a stack keeps its kind, and so does one whose weight the base lacks.
    """
    return {
        group.path: _stack_on(base, pack, group) if is_stacked(group.kind) else _kind_on(base, pack, group)
        for group in pack.manifest.adapter_groups
    }


def _kind_on(base: Checkpoint, pack: Described, group: Group) -> str | None:
    weight = None
    if group.kind in LINEAR:
        weight = base.weight_name(group.path, group.weight) or base.tied_to(group.path)
    if weight is None:
        return group.kind
    if len(stored := base.tensors[weight].shape) != 2:
        return kind_of_shape(stored, pack, group)
    return base.linear_kind(weight) or (None if has_transposed(base.kinds_by_name) else group.kind)


def _stack_on(base: Checkpoint, pack: Described, group: Group) -> str | None:
    """Returns the kind of a stack, from the shape of one of its matrices; for a square matrix the model type
    decides.
    """
    try:
        stored = base.weight_shape(group.path, group.weight)
    except SiteNotFound:
        return group.kind
    # A stack that is not square fits only one of the two orders of its axes.
    wanted = group.out_features, group.in_features
    fitting = [
        kind
        for kind in _STACKS
        if (kind == group.kind or may_be(pack, group, kind)) and matrix_shape(kind, stored) == wanted
    ]
    if len(fitting) < 2 or not (model_type := base.config.get("model_type")):
        return fitting[0] if len(fitting) == 1 else group.kind if not fitting else None
    return "turned_experts" if model_type in _TRANSPOSED_EXPERTS else "experts"


def kind_of_shape(stored: tuple[int, ...], pack: Described, group: Group) -> str:
    """Returns the kind of a group's layer from the shape of its weight alone: a convolution, if the weight
    has a convolution's axes and the group's tensors are compatible with one.
    """
    if group.role != "adapter" or group.kind not in LINEAR:
        return group.kind
    return next(
        (
            kind
            for kind in CONVOLUTIONS
            if may_be(pack, group, kind) and matrix_shape(kind, stored) is not None
        ),
        group.kind,
    )


def may_be(pack: Described, group: Group, kind: str) -> bool:
    """Whether the layer of a group could also be of that ``kind``: because PEFT's file does not show the
    difference and the base is unknown, or because a checkpoint does not show it either.
    """
    is_open = not any(compatibility.recorded_fingerprint(pack.manifest.base)) or any(
        {group.kind, kind} <= one for one in _UNSHOWN
    )
    return is_open and _same_tensors(pack.method_of(group), group.kind, kind, pack.shapes.get(group.path, {}))


def _same_tensors(method: Method, kind: str, other: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether tensors of these ``shapes`` (by parameter), which were read as those of one kind of site, could
    belong to ``other``.

    Example:
        >>> from adapterpack.adapter_methods import get
        >>> _same_tensors(get("hra"), "linear", "conv", {"hra_u": (12, 4)}), _same_tensors(get("lora"),
        ...     "linear", "conv",
        ...     {"lora_A": (4, 12)})
        (True, False)
    """
    if is_stacked(kind) and is_stacked(other):
        return True  # a method sees the same matrices, transposed or not
    plain = None if method.peft is None else method.peft.layers.get(other)
    if plain is None or kind not in method.traits.layers:
        return False
    if plain == (method.peft and method.peft.layers.get(kind)):
        return True
    form = plain._replace(suffixes=dict(plain.suffixes or (method.peft.suffixes if method.peft else {})))
    named = {(form.suffixes or {}).get(param, param): shape for param, shape in shapes.items()}
    if kind == method.traits.layers[0]:
        return plain.is_silent or (
            plain.shapes_say_so is not leave_open and plain.shapes_say_so(named) is None
        )
    return form.is_of(form.config, named)


def require_shapes(pack: Described, base: Checkpoint, renamed: bool) -> None:
    """Checks that a base has every weight that a pack changes, in the pack's shape. ``renamed``: the base's
    tensors may have other names.

    Raises:
        SiteNotFound: a weight is missing.
        BaseMismatch: a weight has another shape.
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


def require_certain(pack: Described, group: Group, site: Site) -> None:
    """Checks that PEFT's tensors of a group have only one meaning at the layer ``site``. A pack that names
    its base always passes.

    Raises:
        Unsupported: the tensors are ambiguous; the error says why.
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
        BaseMismatch: the weight belongs to another kind of layer, or has another shape.
    """
    shape = matrix_shape(group.kind, stored)
    features = (group.out_features, group.in_features)
    place = f"{where}, {group.path}"
    bound = any(compatibility.recorded_fingerprint(pack.manifest.base))
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
    if unfoldable(group.kind):  # the adapter reads all groups' inputs, the weight shows one group's
        features = (features[0], None)
    if any(expected not in {None, actual} for expected, actual in zip(features, shape, strict=True)):
        raise BaseMismatch(
            "a site has another shape in this base",
            where=place,
            expected=f"{features} of kind '{group.kind}'",
            found=shape,
            remedy=_ITS_BASE if bound else "use the model that the adapter was trained on",
        )
