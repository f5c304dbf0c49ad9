"""Renames the modules of a pack to the names that they have in a loaded base."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from msgspec.structs import replace

from ..adapter_methods import is_bare
from ..base import Checkpoint, compatibility, find_places
from ..peft.names import prefix_of
from .lineage import descend
from .pack import Pack, is_module, seal


def named_on(pack: Pack, base: Checkpoint) -> Pack:
    """Returns the pack with the names that its modules have in memory after ``base`` is loaded. A pack that
    identifies its base keeps its names.
    """
    return (
        pack
        if any(compatibility.recorded_fingerprint(pack.manifest.base))
        else move_paths(pack, places_on(pack, base))
    )


def places_on(pack: Pack, base: Checkpoint) -> dict[str, str]:
    """Returns the paths of a pack's modules that change when ``base`` is loaded -> their paths in memory."""
    names = weight_names(pack)
    places = find_places(names.values(), base.tensors, base.renamings)
    return {path: places[name].removesuffix(".weight") for path, name in names.items() if name in places}


def rewritten_on(pack: Pack, base: Checkpoint) -> Pack:
    """Renames modules like :func:`named_on`, but for any pack. If names change, the result is a new pack
    whose lineage names the original.
    """
    places = places_on(pack, base)
    if not places:
        return pack
    lineage = descend("convert", [pack], {"renamed": len(places)})
    return move_paths(
        dataclasses.replace(pack, manifest=replace(pack.manifest, lineage=lineage)), places, sealing=True
    )


def weight_names(pack: Pack) -> dict[str, str]:
    """Returns path -> name of the weight, for the modules and parameters that a pack changes."""
    return {
        group.path: group.path if is_bare(group.kind) else f"{group.path}.weight"
        for group in pack.manifest.groups
        if is_module(group.path)
    }


def move_paths(pack: Pack, paths: Mapping[str, str], sealing: bool = False) -> Pack:
    """Returns the pack with other paths for its modules (old -> new). That is a new pack, unless the pack
    identifies its base; with ``sealing`` it is a new pack even then.
    """
    if not paths:
        return pack
    manifest = pack.manifest
    prefix = prefix_of(pack.method)
    # A pack bound to a base keeps its files: the result is then a view of it that is never written.
    bound = not sealing and any(compatibility.recorded_fingerprint(manifest.base))

    def rename_leaf(name: str) -> str:
        path = manifest.tensors[name].group
        before = f"{prefix}{path}"
        return (
            name
            if bound or path not in paths or not name.startswith(before)
            else f"{prefix}{paths[path]}{name.removeprefix(before)}"
        )

    tensors = {
        rename_leaf(name): replace(entry, group=paths.get(entry.group, entry.group))
        for name, entry in manifest.tensors.items()
    }
    draft = replace(
        manifest,
        groups=tuple(replace(group, path=paths.get(group.path, group.path)) for group in manifest.groups),
        tensors={name: tensors[name] for name in sorted(tensors)},
    )
    if bound:
        return dataclasses.replace(pack, manifest=draft)
    return dataclasses.replace(
        seal(draft, {rename_leaf(name): value for name, value in pack.tensors.items()}, pack.extra),
        alias=pack.alias,
    )
