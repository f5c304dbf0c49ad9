"""Reads the packs that become members of a fleet: their changes as factors, and the union of their sites."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from ..adapter_methods import Site
from ..composing.as_factors import represent
from ..composing.compatibility import require_same_site
from ..lowrank import Factors
from ..lowrank.factors import inner
from ..pack import Pack


class Candidate(NamedTuple):
    """A pack, its sites by path with their base tensors, its change at each site, and the squared norm of the
    full change.
    """

    pack: Pack
    sites: dict[str, tuple[Site, str | None]]
    changes: dict[str, Factors]
    energy: dict[str, float]

    @property
    def weight(self) -> float:
        """The factor that scales its full change to norm 1."""
        total = sum(self.energy.values())
        return total**-0.5 if total else 0.0

    @property
    def whole(self) -> int:
        """The bytes of its fully trained modules."""
        return sum(value.nbytes for params in self.pack.full().values() for value in params.values())

    @property
    def bytes(self) -> int:
        """The bytes of all its tensors."""
        return sum(value.nbytes for value in self.pack.tensors.values())


def candidates(packs: Sequence[Pack]) -> list[Candidate]:
    """Returns the packs with their changes as factors.

    Raises:
        Unsupported: factors cannot represent a change, or a site that two packs describe differently.
    """
    found = []
    known: dict[str, tuple[str, Site]] = {}
    for pack in packs:
        sites = {}
        changes = {}
        energy = {}
        for adapter in pack.adapters():
            change = represent(adapter).factors
            m, n = change.shape
            site = dataclasses.replace(adapter.site, in_features=n, out_features=m)
            require_same_site(known.setdefault(site.path, (pack.name, site)), (pack.name, site), "compress")
            sites[site.path] = (site, adapter.weight)
            changes[site.path] = change
            energy[site.path] = max(inner(change, change), 0.0)
        found.append(Candidate(pack, sites, changes, energy))
    return found


def joint_sites(found: Sequence[Candidate]) -> dict[str, Site]:
    """Returns the union of their sites by path, in the order in which they first appear."""
    sites: dict[str, Site] = {}
    for one in found:
        for path, (site, _) in one.sites.items():
            sites.setdefault(path, site)
    return sites


def weights_of(found: Sequence[Candidate]) -> dict[str, str | None]:
    """Maps each site to its base tensor."""
    return {path: weight for one in found for path, (_, weight) in one.sites.items()}
