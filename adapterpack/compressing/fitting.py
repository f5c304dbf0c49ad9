"""Fits bases to candidates, cluster by cluster, and measures the error of each change in its bases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..lowrank import Term, gram
from .candidates import Candidate, joint_sites
from .joint_bases import Bases, group, joint_bases

REFINEMENTS = 2
"""How often packs move to the cluster whose bases represent them best, after which the bases are fitted
again.
"""


class StoredCore(NamedTuple):
    """A core in its stored form: int8 ``[k, k]`` with one scale for each row ``[k, 1]``."""

    codes: np.ndarray
    scales: np.ndarray

    @classmethod
    def of(cls, exact: np.ndarray) -> StoredCore:
        """Rounds a float64 core: every number is within half of its row's scale."""
        scales = np.maximum(np.abs(exact).max(axis=1, keepdims=True) / 127, np.finfo(np.float32).tiny).astype(
            np.float32
        )
        return cls(np.clip(np.rint(exact / scales), -127, 127).astype(np.int8), scales)

    @property
    def values(self) -> np.ndarray:
        """Returns the dequantized numbers, float64."""
        made: np.ndarray = self.codes.astype(np.float64) * self.scales
        return made


class MemberDraft(NamedTuple):
    """A future member: its cores by site, the relative error over all sites and at the worst site, and its
    candidate.

    ``alone``: it keeps the candidate's factors instead of cores.
    """

    cluster: int
    cores: Mapping[str, StoredCore]
    error: float
    worst: float
    candidate: Candidate
    alone: bool = False

    def within(self, error_budget: float | None) -> MemberDraft:
        """Returns the draft, turned to ``alone`` if its error exceeds the budget."""
        return self._replace(alone=error_budget is not None and self.error > error_budget)


class Fit(NamedTuple):
    """Bases of one rank by cluster and site, and the members in order."""

    rank: int
    bases: Sequence[Mapping[str, Bases]]
    members: tuple[MemberDraft, ...]

    def with_members(self, found: Sequence[Candidate], error_budget: float | None) -> Fit:
        """Adds members on the same bases; a member whose error exceeds the budget is alone."""
        return self._replace(
            members=(*self.members, *(_best(one, self.bases).within(error_budget) for one in found))
        )

    def within(self, error_budget: float | None) -> Fit:
        """Returns the fit with all members alone whose error exceeds the budget."""
        return self._replace(members=tuple(draft.within(error_budget) for draft in self.members))


def fit_bases(found: Sequence[Candidate], rank: int, clusters: int) -> Fit:
    """Fits bases of ``rank`` (at most the width of a site) to candidates of equal weight."""
    count = min(clusters, len(found))
    assigned = np.zeros(len(found), int) if count == 1 else group(_similarity(found), count)
    bases = _bases(found, assigned, rank, count)
    for _ in range(REFINEMENTS if count > 1 else 0):
        better = np.array([_best(one, bases).cluster for one in found])
        if np.array_equal(better, assigned):
            break
        assigned = better
        bases = _bases(found, assigned, rank, count)
    return Fit(rank, bases, tuple(_best(one, bases) for one in found))


def _similarity(found: Sequence[Candidate]) -> np.ndarray:
    """Returns the inner products ``[T, T]`` of the full changes, each scaled to norm 1."""
    total = np.zeros((len(found), len(found)))
    for path in joint_sites(found):
        there = [number for number, one in enumerate(found) if path in one.changes]
        terms = [Term(found[number].changes[path].A, found[number].changes[path].B, 1.0) for number in there]
        weights = np.array([found[number].weight for number in there])
        total[np.ix_(there, there)] += gram(terms) * weights[:, None] * weights
    return total


def _bases(found: Sequence[Candidate], assigned: np.ndarray, rank: int, count: int) -> list[dict[str, Bases]]:
    made: list[dict[str, Bases]] = [{} for _ in range(count)]
    for path, site in joint_sites(found).items():
        m, n = site.out_features, site.in_features
        k = min(rank, m, n)
        for cluster in range(count):
            inside = [
                one
                for one, own in zip(found, assigned, strict=True)
                if own == cluster and path in one.changes
            ]
            bases = Bases(np.eye(m, k), np.eye(k, n))
            if inside:  # else no member of this cluster changes the site
                bases = joint_bases([one.changes[path] for one in inside], [one.weight for one in inside], k)
            made[cluster][path] = Bases(bases.up.astype(np.float32), bases.down.astype(np.float32))
    return made


def _best(one: Candidate, bases: Sequence[Mapping[str, Bases]]) -> MemberDraft:
    """Returns a candidate's draft in the cluster with the least error."""
    return min(
        (_in_cluster(one, cluster, sites) for cluster, sites in enumerate(bases)),
        key=lambda draft: draft.error,
    )


def _in_cluster(one: Candidate, cluster: int, bases: Mapping[str, Bases]) -> MemberDraft:
    """Computes the error with ``|D - U C' V|^2 = |D|^2 - 2 <U^T D V^T, C'> + <U^T U C' V V^T, C'>`` for the
    stored core ``C'`` and the stored bases, which in float32 are not exactly orthonormal.
    """
    cores, tails = {}, {}
    for path, change in one.changes.items():
        wide = Bases(bases[path].up.astype(np.float64), bases[path].down.astype(np.float64))
        exact = wide.core(change)
        cores[path] = StoredCore.of(exact)
        stored = cores[path].values
        images = (wide.up.T @ wide.up) @ stored @ (wide.down @ wide.down.T)
        tails[path] = max(
            one.energy[path] - 2 * float(np.vdot(exact, stored)) + float(np.vdot(images, stored)), 0.0
        )
    total = sum(one.energy.values())
    worst = max((tails[path] / energy for path, energy in one.energy.items() if energy), default=0.0)
    return MemberDraft(
        cluster, cores, math.sqrt(sum(tails.values()) / total) if total else 0.0, math.sqrt(worst), one
    )
