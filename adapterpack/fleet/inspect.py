"""Summarises and validates fleets."""

from __future__ import annotations

from pathlib import Path

from ..base import Checkpoint
from ..errors import AdapterpackError
from ..io import Json, strict_json
from ..pack.validate import NO_BASE
from ..pack.validate.checks import Report, unreadable
from .fleet import Fleet


def inspect_fleet(path: Path) -> Json:
    """Loads and verifies a fleet, and returns its summary as JSON values."""
    fleet = Fleet.load(path)
    manifest = fleet.manifest
    return {
        "kind": "fleet",
        "path": str(path),
        "id": manifest.id,
        "name": manifest.name,
        "base": strict_json.plain(manifest.base),
        "rank": manifest.rank,
        "clusters": manifest.clusters,
        "error_budget": manifest.error_budget,
        "sites": len(manifest.sites),
        "bytes": fleet.nbytes,
        "members": [
            {
                "name": one.name,
                "pack": one.pack,
                "cluster": one.cluster,
                "error": one.error,
                "worst_site_error": one.worst,
            }
            for one in manifest.members
        ],
    }


def validate_fleet(path: Path, base: Path | None, allow_structural: bool) -> Report:
    """Checks that a fleet can be read, that every byte matches its manifest, that each member is a pack and,
    with ``base``, that it belongs to that base.

    Problems are findings, not exceptions.
    """
    identity, verdict = None, None
    try:
        fleet = Fleet.load(path)
        identity = fleet.manifest.id
        packs = [fleet.pack(name) for name in fleet.names]
        if base is not None:
            checkpoint = Checkpoint(base)
            for pack in packs:
                verdict = pack.require_base(checkpoint, allow_structural=allow_structural)
    except AdapterpackError as error:
        return Report("fleet", str(path), identity, (unreadable(error, path),), base=verdict)
    return Report("fleet", str(path), identity, (), () if base is not None else (NO_BASE,), base=verdict)
