"""What an update changed, in words: commit, digest, and for packs what their manifests say."""

from __future__ import annotations

from pathlib import Path

from ..errors import AdapterpackError
from ..manifest import manifest as m
from ..pack.validate.checks.folder import read_manifest
from . import bundle_cache
from .lockfile import Pinned


def changes(before: Pinned, kind: str, identity: str, path: Path) -> tuple[str, ...]:
    """The differences between what was pinned and what was pulled now; nothing if they are the same artifact."""
    if (before.kind, before.id) == (kind, identity):
        return ()
    told = [f"kind: {before.kind} -> {kind}"] if before.kind != kind else []
    told.append(f"id: {before.id} -> {identity}")
    old = bundle_cache.kept(before.kind, before.id)
    if old is None:
        return (*told, "what was pinned is not in the store any more: no closer look")
    if "bundle" in {before.kind, kind}:
        return tuple(told)
    try:
        one, other = (m.parse(read_manifest(folder / m.FILE_NAME), folder) for folder in (old, path))
    except AdapterpackError as error:
        return (*told, f"no closer look: {error.what}")
    return (*told, *_in_manifests(one, other))


def _in_manifests(one: m.Manifest, other: m.Manifest) -> list[str]:
    told = []
    if one.tensors != other.tensors:
        names = one.tensors.keys() | other.tensors.keys()
        differing = sum(one.tensors.get(name) != other.tensors.get(name) for name in names)
        told.append(f"tensors: {differing} of {len(names)} differ")
    before, after = one.to_json(), other.to_json()
    for key in sorted(after):
        if key not in {"tensors", "files"} and before.get(key) != after[key]:
            short = [str(value[key])[:80] for value in (before, after)]
            told.append(f"{key}: {short[0]} -> {short[1]}" if len("".join(short)) < 120 else f"{key} differs")
    return told
