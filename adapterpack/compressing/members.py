"""Converts a fit to a fleet and a fleet back to a fit."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..adapter_methods import Arrays, Site
from ..fleet.fleet import Fleet
from ..fleet.manifest import FleetSite, Member, Whole
from ..io import dtype_name
from ..lowrank import Factors
from ..manifest.structs import Base
from .candidates import Candidate, weights_of
from .fitting import Fit, MemberDraft, StoredCore
from .joint_bases import Bases


def assemble(name: str, base: Base, fit: Fit, error_budget: float | None, sites: Mapping[str, Site]) -> Fleet:
    """Builds the fleet of a fit. The fleet records ``error_budget``."""
    numbers = {path: number for number, path in enumerate(sites)}
    weights = weights_of([draft.candidate for draft in fit.members])
    tensors: Arrays = {}
    members, shared = [], []
    for number, draft in enumerate(fit.members):
        one, alone = draft.candidate, draft.alone
        places = {place: one.changes[path] for path, place in numbers.items() if path in one.changes}
        for place, change in places.items() if alone else ():
            tensors |= {
                f"A.{number}.{place}": change.A.astype(np.float32),
                f"B.{number}.{place}": change.B.astype(np.float32),
            }
        whole: list[Whole] = []
        for path, params in one.pack.full().items():
            behind = next((group.weight for group in one.pack.manifest.groups if group.path == path), None)
            for param, value in params.items():
                tensors[f"whole.{number}.{len(whole)}"] = value
                whole.append(Whole(path, param, behind, dtype_name(value.dtype), tuple(value.shape)))
        if not alone:
            shared.append(draft)
        manifest = one.pack.manifest
        members.append(
            Member(
                one.pack.name,
                _source(one),
                manifest.task,
                manifest.problem,
                manifest.license,
                None if alone else draft.cluster,
                tuple(places),
                tuple(change.rank for change in places.values()) if alone else (),
                tuple(whole),
                0.0 if alone else draft.error,
                0.0 if alone else draft.worst,
            )
        )
    for path, place in numbers.items() if shared else ():
        k = len(fit.bases[0][path].down)
        for cluster in sorted({draft.cluster for draft in shared}):
            tensors |= {
                f"up.{place}.{cluster}": fit.bases[cluster][path].up,
                f"down.{place}.{cluster}": fit.bases[cluster][path].down,
            }
        nothing = StoredCore.of(np.zeros((k, k)))
        cores = [draft.cores.get(path, nothing) for draft in shared]
        tensors[f"cores.{place}"] = np.stack([core.codes for core in cores])
        tensors[f"scales.{place}"] = np.stack([core.scales for core in cores])
    return Fleet.sealed(
        tensors,
        name=name,
        base=base,
        rank=fit.rank,
        clusters=len(fit.bases),
        error_budget=error_budget,
        members=tuple(members),
        sites=tuple(
            FleetSite(path, site.kind, site.in_features, site.out_features, site.bias, weights.get(path))
            for path, site in sites.items()
        ),
    )


def _source(one: Candidate) -> str:
    """Returns the id of the pack that a member comes from; if the candidate was itself taken from a fleet,
    the id of its parent.
    """
    lineage = one.pack.manifest.lineage
    return (
        lineage.parents[0].digest if lineage is not None and lineage.operation == "compress" else one.pack.id
    )


def drafts_of(fleet: Fleet) -> tuple[dict[str, Site], Fit]:
    """Returns the sites of a fleet and its fit; assembling the fit again gives the same fleet."""
    manifest = fleet.manifest
    sites = {
        site.path: Site(site.path, site.in_features, site.out_features, site.kind, site.bias)
        for site in manifest.sites
    }
    bases: list[dict[str, Bases]] = [{} for _ in range(manifest.clusters)]
    for number, site in enumerate(manifest.sites):
        k = manifest.rank_at(site)
        for cluster, held in enumerate(bases):
            up, down = (fleet.tensors.get(f"{side}.{number}.{cluster}") for side in ("up", "down"))
            held[site.path] = Bases(
                np.eye(site.out_features, k, dtype="f4") if up is None else up,
                np.eye(k, site.in_features, dtype="f4") if down is None else down,
            )
    return sites, Fit(manifest.rank, bases, tuple(_draft(fleet, member) for member in manifest.members))


def _draft(fleet: Fleet, member: Member) -> MemberDraft:
    pack = fleet.pack(member.name)
    shared = fleet.shared(member.name)
    factors = {adapter.site.path: adapter for adapter in pack.adapters()}
    sites = {path: (adapter.site, adapter.weight) for path, adapter in factors.items()}
    changes = {
        path: Factors(adapter.params["lora_A"], adapter.params["lora_B"]) for path, adapter in factors.items()
    }
    cores = {path: StoredCore(one.codes, one.scales) for path, one in shared.items()}
    candidate = Candidate(pack, sites, changes, {})
    alone = member.cluster is None
    return MemberDraft(member.cluster or 0, cores, member.error, member.worst, candidate, alone)
