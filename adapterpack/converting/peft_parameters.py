"""Writes packs that PEFT stores differently than a pack's folder: parameters, stacks of experts
(``target_parameters``), prefixes of decoders.

PEFT treats the two parameters of torch's own attention as one module, with one rank and one scale for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from msgspec.structs import replace

from ..adapter_methods import is_bare
from ..adapter_methods.peft.attention import OUT
from ..adapter_methods.peft.parameters import wrappers_of
from ..errors import Unsupported
from ..io import TENSORS, safetensors
from ..manifest import Group
from ..pack import METADATA, Pack
from ..peft import layout
from ..peft.names import PREFIX
from ..tasks import peft_type_of
from .base import BaseModel

TWICE = (
    "PEFT up to 0.21.2 adds the change of an attention's out_proj twice, and this folder is written for it: "
    "a version that adds it once takes it for half of what it is"
)
_IN = ".in_proj_weight"
_OUT = ".out_proj.weight"
_APART = ".q_proj_weight"


def of_parameters(pack: Pack, base: BaseModel | None) -> tuple[dict[str, bytes], tuple[str, ...]] | None:
    """Returns the files of PEFT's folder by name, and notes on them; None if the pack changes no parameters,
    or PEFT does not support its method for parameters.

    Raises:
        Unsupported: PEFT has no such adapter of torch's own attention; or only ``base``, which is missing,
            could show whether a parameter belongs to it.
    """
    form = pack.method.peft
    groups = {group.path: group for group in pack.groups if group.role == "adapter" and is_bare(group.kind)}
    if (
        form is None
        or "bare_parameters" not in form.overrides
        or not groups
        or any(group.method is not None for group in groups.values())
    ):
        return None
    owners = [owner for path in groups if (owner := _attention(path, groups, base)) is not None]
    modules = [
        replace(group, path=group.path.removesuffix(_IN), kind="linear")
        if group.path.removesuffix(_IN) in owners
        else group
        for group in pack.manifest.groups
        if group.path.removesuffix(_OUT) not in owners
    ]
    config = layout.config_bytes(replace(pack.manifest, groups=tuple(modules)), parameters=True)
    if config is None:
        return None
    wrappers = wrappers_of(
        path for path in groups if not any(path in (owner + _IN, owner + _OUT) for owner in owners)
    )
    written = {
        wrapper: form.overrides["bare_parameters"](pack.site(groups[path]), pack.params(path))
        for path, wrapper in wrappers.items()
    }
    for owner in dict.fromkeys(owners):
        written |= {owner: pack.params(owner + _IN), owner + OUT: _halve(pack, owner, groups)}
    tensors = {
        name: value for name, value in pack.tensors.items() if pack.manifest.tensors[name].group not in groups
    }
    tensors |= {
        f"{PREFIX}{wrapper}.{form.suffixes[param]}": value
        for wrapper, params in written.items()
        for param, value in params.items()
    }
    return {TENSORS: b"".join(safetensors.pieces(tensors, METADATA)), layout.CONFIG: config}, (
        TWICE,
    ) if owners else ()


def _attention(path: str, groups: Mapping[str, Group], base: BaseModel | None) -> str | None:
    """Returns the path of torch's attention module to which a parameter belongs, or None."""
    owner = path.removesuffix(_OUT).removesuffix(_IN)
    if owner == path:
        return None

    def has(end: str) -> bool:
        return owner + end in groups or (base is not None and base.stored_shape(owner + end) is not None)

    if has(_APART):
        raise Unsupported(
            "PEFT has no adapters of torch's own attention where keys or values have a width of their own",
            where=path,
            found=groups[path].kind,
            remedy="keep the pack as it is",
        )
    if not has(_IN) and base is None:
        raise Unsupported(
            "PEFT has another form for this parameter if it belongs to torch's own attention",
            where=path,
            found=groups[path].kind,
            expected="the base",
            remedy="name it with --base",
        )
    return owner if has(_IN) else None


def _halve(pack: Pack, owner: str, groups: Mapping[str, Group]) -> dict[str, Any]:
    """Returns the factors of ``out_proj`` for half of its change, in the scale of ``in_proj_weight``: PEFT
    adds this change twice.

    Raises:
        Unsupported: one of the two is not changed, or they have different ranks.
    """
    both = [groups.get(owner + end) for end in (_IN, _OUT)]
    configs = [pack.config_at(group) for group in both if group is not None]
    if len(configs) < 2 or configs[0].r != configs[1].r or not configs[0].scale:
        raise Unsupported(
            "PEFT changes both parameters of torch's own attention, with one rank",
            where=f"pack '{pack.name}', {owner}",
            found=(
                f"{', '.join(group.kind for group in both if group)}, of rank "
                f"{', '.join(str(cfg.r) for cfg in configs)}"
            ),
            remedy="keep the pack as it is",
        )
    params = pack.params(owner + _OUT)
    factor = configs[1].scale / (2 * configs[0].scale)
    return (
        params
        if factor == 1
        else {**params, "lora_B": (np.asarray(params["lora_B"]) * factor).astype(params["lora_B"].dtype)}
    )


def reorder_for_peft(pack: Pack) -> dict[str, bytes] | None:
    """Returns the files of PEFT's folder with the tensors of the only site in PEFT's order; None if PEFT has
    no such adapter.
    """
    form = pack.method.peft
    adapters = [group for group in pack.groups if group.role == "adapter"]
    if (
        form is None
        or "reorder_for_peft" not in form.overrides
        or len(adapters) != 1
        or len(pack.methods) > 1
    ):
        return None
    path = adapters[0].path
    made = form.overrides["reorder_for_peft"](
        pack.config_at(adapters[0]), pack.params(path), peft_type_of(pack.manifest.task.type)
    )
    if made is None or (config := layout.config_bytes(pack.manifest, reordered=made[0])) is None:
        return None
    places = {entry.param: name for name, entry in pack.manifest.tensors.items() if entry.group == path}
    tensors = {**pack.tensors, **{places[param]: value for param, value in made[1].items()}}
    return {TENSORS: b"".join(safetensors.pieces(tensors, METADATA)), layout.CONFIG: config}
