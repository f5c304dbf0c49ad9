"""Compresses packs of one base into a fleet, and adds packs to an existing fleet."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

from ..composing.arguments import chosen_name
from ..composing.compatibility import common_base
from ..errors import ConfigError, NothingToDo, Unsupported
from ..fleet.fleet import Fleet
from ..io import one_thread_each, refuse_existing
from ..io.atomic import exchanged_folder
from ..pack import Pack, as_pack
from ..paths import StrPath
from .candidates import Candidate, candidates, joint_sites
from .fitting import Fit, fit_bases
from .members import assemble, drafts_of

RANKS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""The ranks to try when a budget for error or size determines the rank."""


def compress(
    packs: Sequence[Pack | StrPath],
    *,
    out: StrPath | None = None,
    basis: int | None = None,
    clusters: int = 1,
    error_budget: float | None = None,
    size_budget: float | None = None,
    into: StrPath | None = None,
    name: str | None = None,
) -> Fleet:
    """Compresses packs of one base into a fleet: shared bases at each site, and a small int8 core for each
    pack.

    Args:
        packs: packs or their folders, of any methods whose changes are held by factors. Modules that were
            trained whole are kept.
        out: a new folder for the fleet.
        basis: the rank of the bases. Without it the budgets decide.
        clusters: packs are sorted into so many groups by their likeness, each with bases of its own.
        error_budget: the relative error of a pack's whole change. Without ``basis`` the least rank is taken
            under which no pack makes more; with it, and in a fleet for all that are added later, a pack above
            it keeps its own factors.
        size_budget: the bytes that the fleet's tensors may have, or below 1 that share of the packs' own.
            Without ``basis`` it is the largest rank that fits.
        into: a fleet that the packs are added to, by projection onto its bases, which stay as they are. It is
            replaced, unless there is an ``out``.
        name: the fleet's name; by default that of its folder.

    Returns:
        The fleet. ``fleet.manifest.members`` hold the error of each, over all sites and at the worst.

    Raises:
        ConfigError: nothing says how large the bases are to be, two packs have one name, or the packs do not
            fit the size.
        BaseMismatch: the packs are of different bases.
        Unsupported: a change that no factors hold.

    Example:
        >>> fleet = compress(["packs/a", "packs/b"], basis=32, out="fleet")  # doctest: +SKIP
        >>> [(member.name, member.error) for member in fleet.manifest.members]  # doctest: +SKIP
        [('a', 0.04), ('b', 0.05)]
    """
    _require_settings(basis, clusters, error_budget, size_budget, into)
    refuse_existing(out)
    loaded = [as_pack(pack) for pack in packs]
    if not loaded:
        raise NothingToDo("there are no packs to compress", remedy="name at least one pack")
    if into is not None:
        return _add(
            Fleet.load(into),
            loaded,
            error_budget,
            size_budget,
            Path(into if out is None else out),
            replaced=out is None,
        )
    _require_names([pack.name for pack in loaded])
    with one_thread_each():
        found = candidates(loaded)
        fit = _choose_fit(found, basis, clusters, error_budget, size_budget).within(error_budget)
    fleet = assemble(
        chosen_name(name, out, "fleet", []), common_base(loaded), fit, error_budget, joint_sites(found)
    )
    _require_size(fleet, found, size_budget)
    return fleet if out is None else fleet.write(out)


def _require_settings(
    basis: int | None, clusters: int, error_budget: float | None, size_budget: float | None, into: object
) -> None:
    if basis is None and error_budget is None and size_budget is None and into is None:
        raise ConfigError(
            "nothing says how large the bases are to be",
            where="compress",
            expected="basis, error_budget or size_budget",
            remedy="give one, such as --basis 32 (basis=32)",
        )
    if into is not None and (basis is not None or clusters != 1):
        raise ConfigError(
            "the bases of a fleet stay as they are", where="into", remedy="leave basis and clusters out"
        )
    for what, value, most in (
        ("basis", basis, 65_536),
        ("clusters", clusters, 64),
        ("error_budget", error_budget, 1e6),
        ("size_budget", size_budget, 1e15),
    ):
        counts = isinstance(value, Integral) and not isinstance(value, bool)
        fits = counts or (isinstance(value, float) and "budget" in what)
        if value is not None and not (fits and 0 < value <= most):
            raise ConfigError(
                "a setting is out of range",
                where=what,
                expected=f"above 0, at most {most}",
                found=value,
                remedy="give another value",
            )


def _require_names(names: Sequence[str]) -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(
            "two members of a fleet cannot have one name", found=twice, remedy="rename one of the packs"
        )


def _choose_fit(
    found: Sequence[Candidate],
    basis: int | None,
    clusters: int,
    error_budget: float | None,
    size_budget: float | None,
) -> Fit:
    """Returns the fit of the given rank, or of the rank that the budgets allow."""
    if basis is not None:
        return fit_bases(found, basis, clusters)
    most = max(max(change.shape) for one in found for change in one.changes.values())
    ranks = [rank for rank in RANKS if rank < most] + [most]
    if error_budget is None:
        assert size_budget is not None
        fitting = [rank for rank in ranks if _bytes(found, rank, clusters) <= _limit(found, size_budget)]
        if not fitting:
            raise ConfigError(
                "the packs do not fit the size even at rank 1",
                where="size_budget",
                found=size_budget,
                expected=f"at least {_bytes(found, 1, clusters)} bytes",
                remedy="allow more bytes",
            )
        return fit_bases(found, fitting[-1], clusters)
    low = 0
    high = len(ranks) - 1
    best = fit_bases(found, ranks[-1], clusters)
    while low < high:
        middle = (low + high) // 2
        fit = fit_bases(found, ranks[middle], clusters)
        if max(one.error for one in fit.members) <= error_budget:
            best, high = fit, middle
        else:
            low = middle + 1
    return best


def _bytes(found: Sequence[Candidate], rank: int, clusters: int) -> int:
    """Returns the size of a fleet with bases of that rank if no pack keeps its own factors."""
    total = sum(one.whole for one in found)
    for site in joint_sites(found).values():
        k = min(rank, site.in_features, site.out_features)
        total += 4 * clusters * k * (site.in_features + site.out_features) + len(found) * k * (k + 4)
    return total


def _limit(found: Sequence[Candidate], size_budget: float) -> float:
    return size_budget * sum(one.bytes for one in found) if size_budget < 1 else size_budget


def _require_size(fleet: Fleet, found: Sequence[Candidate], size_budget: float | None) -> None:
    if size_budget is not None and fleet.nbytes > (limit := _limit(found, size_budget)):
        raise ConfigError(
            "the packs do not fit the size within the error",
            where="size_budget",
            expected=f"at most {limit:.0f} bytes",
            found=fleet.nbytes,
            remedy="allow more bytes, a larger error, or a smaller basis",
        )


def _add(
    fleet: Fleet,
    packs: Sequence[Pack],
    error_budget: float | None,
    size_budget: float | None,
    out: Path,
    *,
    replaced: bool,
) -> Fleet:
    """Returns the fleet with more packs, each in the cluster whose bases represent it best."""
    if size_budget is not None and size_budget < 1:
        raise ConfigError(
            "a share of the packs' bytes is no size of a fleet that holds others, too",
            where="size_budget",
            found=size_budget,
            remedy="give bytes",
        )
    common_base([fleet.pack(fleet.names[0]), *packs])
    _require_names([*fleet.names, *(pack.name for pack in packs)])
    budget = fleet.manifest.error_budget if error_budget is None else error_budget
    sites, before = drafts_of(fleet)
    with one_thread_each():
        found = candidates(packs)
        if unknown := sorted(path for path in joint_sites(found) if path not in sites):
            raise Unsupported(
                "a pack changes a site at which the fleet has no bases",
                where=unknown[0],
                remedy="compress all packs again, those of the fleet among them",
            )
        fit = before.with_members(found, budget)
    grown = assemble(fleet.manifest.name, fleet.manifest.base, fit, budget, sites)
    _require_size(grown, found, size_budget)
    return _in_place_of(grown, out) if replaced else grown.write(out)


def _in_place_of(fleet: Fleet, out: Path) -> Fleet:
    """Replaces an older fleet, which stays in place until the new one is complete."""
    with exchanged_folder(out) as new:
        fleet.write(new)
    return Fleet(fleet.manifest, fleet.tensors, out)
