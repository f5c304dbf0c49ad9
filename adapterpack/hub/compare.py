"""Describes what an update changed: kind, digest, and for packs the fields of their manifests."""

from __future__ import annotations

from pathlib import Path

from ..errors import AdapterpackError
from ..manifest import manifest as m
from ..pack.validate.checks.folder import read_manifest
from . import bundle_cache
from .lockfile import PinnedArtifact


def changes(before: PinnedArtifact, kind: str, identity: str, path: Path) -> tuple[str, ...]:
    """Returns the differences between the pinned artifact and the one pulled now; none if they are
    the same.
    """
    if (before.kind, before.id) == (kind, identity):
        return ()
    lines = [f"kind: {before.kind} -> {kind}"] if before.kind != kind else []
    lines.append(f"id: {before.id} -> {identity}")
    old = bundle_cache.find_bundle(before.kind, before.id)
    if old is None:
        return (*lines, "what was pinned is not in the store any more: no closer look")
    if "bundle" in {before.kind, kind}:
        return tuple(lines)
    try:
        one, other = (m.parse(read_manifest(folder / m.FILE_NAME), folder) for folder in (old, path))
    except AdapterpackError as error:
        return (*lines, f"no closer look: {error.what}")
    return (*lines, *_in_manifests(one, other))


def _in_manifests(one: m.Manifest, other: m.Manifest) -> list[str]:
    lines = []
    if one.tensors != other.tensors:
        names = one.tensors.keys() | other.tensors.keys()
        differing = sum(one.tensors.get(name) != other.tensors.get(name) for name in names)
        lines.append(f"tensors: {differing} of {len(names)} differ")
    before, after = one.to_json(), other.to_json()
    for key in sorted(after):
        if key not in {"tensors", "files"} and before.get(key) != after[key]:
            short = [str(value[key])[:80] for value in (before, after)]
            lines.append(
                f"{key}: {short[0]} -> {short[1]}" if len("".join(short)) < 120 else f"{key} differs"
            )
    return lines
