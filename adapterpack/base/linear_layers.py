"""Which way round a base stores the weights of linear layers: ``[out, in]`` as torch does, or ``[in, out]`` as transformers' ``Conv1D``.

A pack that was saved from a model knows it, a folder that PEFT wrote does not: PEFT keeps one flag for all layers, the last one's, and
some methods keep none. What an adapter means does not depend on it, since methods see matrices ``[out, in]``; what a merge writes does, and
for a square weight no shape would show the mistake. The biases of the base show it: they have a number for each output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..adapter_methods.core.layouts import LINEAR
from ..errors import Unsupported
from . import identity

if TYPE_CHECKING:
    from ..io.safetensors import TensorInfo
    from ..manifest.manifest import Group
    from ..pack.pack import Pack
    from .checkpoint import Checkpoint

_CONV1D = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})
"""What every model of transformers that has layers of ``Conv1D`` calls them; other models have linear layers of these names."""


def shown(tensors: Mapping[str, TensorInfo], weight: str) -> str | None:
    """The kind of the linear layer with that weight as its shapes show it: a ``Conv1D`` always has a bias. None where that leaves it open.

    Example:
        >>> from adapterpack.io.safetensors import TensorInfo
        >>> shapes = {"c_fc.weight": (8, 32), "c_fc.bias": (32,), "q.weight": (8, 8), "k.weight": (8, 8), "k.bias": (8,)}
        >>> tensors = {name: TensorInfo(name, "F32", shape, 0, 0) for name, shape in shapes.items()}
        >>> [shown(tensors, f"{name}.weight") for name in ("c_fc", "q", "k")]
        ['transposed', 'linear', None]
    """
    shape, bias = tensors[weight].shape, tensors.get(f"{weight.removesuffix('.weight')}.bias")
    if bias is None:
        return "linear"
    sides = [kind for kind, outputs in zip(("linear", "transposed"), shape, strict=False) if bias.shape == (outputs,)]
    return sides[0] if len(sides) == 1 else None


def kinds_by_name(tensors: Mapping[str, TensorInfo]) -> dict[str, set[str]]:
    """The last part of a module's path -> the kinds that the shapes of such layers with a bias show."""
    found: dict[str, set[str]] = {}
    for name, info in tensors.items():
        stem = name.removesuffix(".weight")
        if stem != name and len(info.shape) == 2 and f"{stem}.bias" in tensors and (kind := shown(tensors, name)) is not None:
            found.setdefault(stem.rpartition(".")[2], set()).add(kind)
    return found


def has_transposed(base: Checkpoint) -> bool:
    """Whether the shapes of any layer show that it is transposed."""
    return any("transposed" in kinds for kinds in base.kinds_by_name.values())


def kind_of(base: Checkpoint, weight: str) -> str | None:
    """The kind of the linear layer with that weight in ``base``: by its own shapes, else by those of layers of its name, else by what
    transformers calls them. None where nothing shows it."""
    if (kind := shown(base.tensors, weight)) is not None:
        return kind
    leaf = weight.removesuffix(".weight").rpartition(".")[2]
    if len(alike := base.kinds_by_name.get(leaf, set())) == 1:
        return next(iter(alike))
    return "transposed" if leaf in _CONV1D and has_transposed(base) else None


def kinds_on(base: Checkpoint, groups: Iterable[Group]) -> dict[str, str | None]:
    """Path -> the kind that its layer has in ``base``, for the groups of linear layers: as the base shows it, and the group's own in a base
    that shows no transposed layer."""
    found = {}
    for group in groups:
        if group.role != "adapter" or group.kind not in LINEAR:
            continue
        weight = base.weight_name(group.path, group.weight) or base.tied_to(group.path)
        if weight is not None:
            found[group.path] = base.linear_kind(weight) or (None if has_transposed(base) else group.kind)
    return found


def on(pack: Pack, base: Checkpoint) -> Pack:
    """The pack with the kinds that its linear layers have in ``base``; nothing that is written of it, and not its id, is another.

    Raises:
        Unsupported: nothing shows how the base stores a layer, and the pack was not made on that base.
    """
    kinds = kinds_on(base, pack.manifest.groups)
    unknown = [path for path, kind in kinds.items() if kind is None]
    if unknown and not any(identity.levels(pack.manifest.base)):
        raise Unsupported("nothing shows which way round the base stores the weight of this layer, and the adapter does not say it",
                          where=f"pack '{pack.name}', {unknown[0]}", expected="[out, in] or [in, out]",
                          found=f"a square weight of {base.where}",
                          remedy="attach it to the model and save that (adapterpack.attach, adapterpack.save): a pack knows its layers")
    changed = {group.path: kind for group in pack.manifest.groups if (kind := kinds.get(group.path)) not in {None, group.kind}}
    return dataclasses.replace(pack, kinds=changed) if changed else pack
