"""Plans a composition without running it: for each group of sites the algorithm, the reason for it, its cost,
and whether the result is exact.

Sites of one shape and the same ranks use the same algorithm (a path). A cost is a number of floating-point
operations and the bytes in memory while one site is combined. The memory bound adds up the maximum of all
steps; it leaves out the packs themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..adapter_methods import complete
from ..io import Json, workers
from ..pack import Adapter, Pack, as_pack
from ..paths import StrPath
from .arguments import opened_base
from .as_factors import exact_factors, require_cut, require_representable, with_widths
from .budget import FULL_RANK
from .pipeline import Packs
from .sites import adapters_by_path
from .steps import BATCH, CompositionRequest, CompositionWork, approximation, common_sums, prepare
from .truncate import MAX_IN_MEMORY

_BLOCKS = 64 << 20
"""An upper bound on the bytes that one thread needs besides the site itself: blocks of rows, orthogonal
directions and the like.
"""


class Sized(NamedTuple):
    """The sizes of one site: ``[m, n]``, the ranks of the packs there, and ``k``, the largest rank of the
    result.
    """

    m: int
    n: int
    ranks: tuple[int, ...]
    k: int

    @property
    def sides(self) -> int:
        """``m + n``."""
        return self.m + self.n

    @property
    def total(self) -> int:
        """The sum of the ranks."""
        return sum(self.ranks)

    @property
    def packs(self) -> int:
        """The number of packs that change the site."""
        return max(1, sum(rank > 0 for rank in self.ranks))


class Path(NamedTuple):
    """An algorithm for a site: its name, why the plan chooses it, its operations and its bytes."""

    name: str
    why: str
    flops: Callable[[Sized], int]
    bytes: Callable[[Sized], int]


PATHS: Mapping[str, Path] = {
    "G": Path(
        "inner products of the factors",
        "the result is a sum of the changes, so inner products decide all of it",
        lambda s: 2 * s.sides * s.total**2,
        lambda s: 8 * 2 * s.sides * s.total,
    ),
    "C": Path(
        "joint bases",
        "the rule acts on directions, and all of them lie in the joint column and row spaces",
        lambda s: 4 * s.sides * s.total**2 + 22 * s.total**3 * s.packs,
        lambda s: 8 * (3 * s.sides * s.total + 2 * s.packs * s.total**2 + s.packs * min(s.total, s.m) * s.n),
    ),
    "S": Path(
        "scaling of one side",
        "rows or columns are scaled, or a small system is solved, and the factors stay as narrow as they are",
        lambda s: 4 * s.sides * s.total**2 + 22 * s.total**3,
        lambda s: 8 * (3 * s.sides * s.total + 2 * s.packs * s.total**2),
    ),
    "F": Path(
        "factors one by one",
        "the rule looks at single rows and columns of the factors",
        lambda s: 4 * s.sides * s.total**2,
        lambda s: 8 * 4 * s.sides * s.total,
    ),
    "moment": Path(
        "a system of the size of the inputs",
        "the moments of the inputs are solved for; the factors stay as narrow as they are",
        lambda s: 2 * s.n**3 // 3 + 4 * s.packs * s.n**2 * max(1, s.total),
        lambda s: 8 * (4 * s.n**2 + 4 * s.total * s.n),
    ),
    "held": Path(
        "dense entries, held",
        "the rule looks at every entry, and the site is small enough to be held while it is cut",
        lambda s: 2 * s.m * s.n * (2 * s.total + 10 * s.k),
        lambda s: 8 * s.m * s.n + 16 * s.sides * (s.k + 24),
    ),
    "streamed": Path(
        "dense entries, in blocks of rows",
        "the rule looks at every entry, and the site is too large to be held: "
        "each pass of the range finder makes the blocks anew",
        lambda s: 2 * s.m * s.n * (5 * s.total + 10 * s.k),
        lambda s: 16 * s.sides * (s.k + 24),
    ),
    "within": Path(
        "parameters of the packs' own method",
        "the changes add up to one of the method's own, number by number",
        lambda s: 2 * s.packs * s.sides,
        lambda s: 8 * (s.packs + 1) * s.sides,
    ),
}
"""The paths by the class of a rule, by what it reads, or for dense rules by how a site is truncated;
``within`` is the path of packs whose method has its own sums.
"""


@dataclass(frozen=True)
class SiteGroup:
    """Sites that take one path: their number, one of their names, ``[m, n]``, the ranks of the packs, and the
    largest rank of the result.
    """

    sites: int
    example: str
    shape: tuple[int, int]
    ranks: tuple[int, ...]
    path: str
    why: str
    exact: bool
    rank: int
    flops: int
    bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class CompositionPlan:
    """The plan of all groups with the totals: operations, memory bound, threads, and the treatment of fully
    trained modules.
    """

    rule: str
    needs: str
    exact: bool
    flops: int
    memory_bound: int
    threads: int
    whole: Mapping[str, Any]
    groups: tuple[SiteGroup, ...]

    def to_json(self) -> Json:
        """Returns the plan as a JSON value."""
        return dataclasses.asdict(self)


def plan(
    packs: Packs,
    *,
    rule: str = "linear",
    weights: Sequence[float] | None = None,
    params: Mapping[str, Any] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    budget: float | None = None,
    whole: str = "average",
    base: StrPath | None = None,
    seed: int = 0,
) -> CompositionPlan:
    """Predicts what :func:`adapterpack.compose` would do with the same arguments, without doing it.

    Raises:
        AdapterpackError: what compose would raise before it begins to combine.

    Example:
        >>> plan(["packs/a", "packs/b"], rule="ties", rank=16).groups[0].path  # doctest: +SKIP
        'dense entries, held'
    """
    request = CompositionRequest(rule, weights, params or {}, rank, energy, budget, whole).with_seed(seed)
    work = prepare([as_pack(pack) for pack in packs], request)
    request, parents = work.request, work.parents
    checkpoint, on_base = opened_base(base, parents)
    within = common_sums(parents, request) is not None
    present = [pack for pack, weight in zip(on_base, work.weights, strict=True) if weight] or on_base
    grouped: dict[tuple[int, int, tuple[int, ...], bool], list[str]] = {}
    for path, adapters in adapters_by_path(present).items():
        sized = [adapter._replace(site=with_widths(adapter, checkpoint)) for adapter in adapters.values()]
        ranks, low_rank = zip(
            *(_rank(adapter, request, within, checkpoint is not None) for adapter in sized), strict=True
        )
        site = sized[0].site
        key = (site.out_features or 0, site.in_features or 0, tuple(ranks), all(low_rank))
        grouped.setdefault(key, []).append(path)
    groups = tuple(
        _group(work, paths, *key, within=within, based=checkpoint is not None)
        for key, paths in grouped.items()
    )
    modules = sorted({group.path for pack in parents for group in pack.manifest.full_groups})
    return CompositionPlan(
        rule,
        work.rule.needs,
        all(group.exact for group in groups),
        sum(group.sites * group.flops for group in groups),
        _bound(groups, modules, parents, request),
        workers(),
        {"policy": whole, "modules": modules},
        groups,
    )


def _rank(adapter: Adapter, request: CompositionRequest, within: bool, based: bool) -> tuple[int, bool]:
    """Returns the rank of an adapter's own factors and True; or the rank of its approximation and False if it
    has no factors.

    Raises:
        Unsupported: the adapter has no factors and the request sets no limit for the approximation. Does not
            apply ``within`` the packs' own method, which needs no factors.
    """
    method, site = adapter.method, adapter.site
    if not within:
        require_representable(adapter, based)
    if "fold" not in method.overrides and method.traits.independent:
        exact = exact_factors(adapter, complete(method, adapter.config, adapter.wide, site), site)
        if exact is not None:
            return len(exact.A), True
    if not within:
        require_cut(adapter, approximation(request))
    side = min(site.out_features or 1, site.in_features or 1)
    return min(side, FULL_RANK if request.rank is None else 2 * request.rank), False


def _group(
    work: CompositionWork,
    paths: list[str],
    m: int,
    n: int,
    ranks: tuple[int, ...],
    low_rank: bool,
    *,
    within: bool,
    based: bool,
) -> SiteGroup:
    rule, request = work.rule, work.request
    side = min(m, n)
    most = side if rule.needs == "D" else min(side, sum(ranks))
    k = 0 if within else min(most, request.rank or most)
    dense = "held" if m * n <= MAX_IN_MEMORY else "streamed"
    by_needs = dense if rule.needs == "D" else "moment" if rule.statistics == "moment" else rule.needs
    path = PATHS["within" if within else by_needs]
    sized = Sized(m, n, ranks, k)
    flops = path.flops(sized)
    peak = path.bytes(sized)
    notes = []
    exact = True
    if not within:
        loses = rule.needs == "D" or (
            request.cuts and (k < most or request.energy is not None or request.budget is not None)
        )
        exact = low_rank and not loses
        if not low_rank:
            notes.append(
                "a change without a low rank is approximated first"
                + ("" if based else "; methods that scale or turn need the base")
            )
            flops += 8 * m * n * max(ranks)
        if request.rank_is_default:
            notes.append(f"no rank was given, so the packs' largest is taken: --rank {request.rank}")
        if loses:
            notes.append("the cut leaves something out; how much is measured and written into the lineage")
        if rule.needs != "D" and (rule.reduce or request.cuts):
            notes.append("brought to its rank by the singular values of a core")
            flops += 8 * sized.sides * sized.total**2 + 22 * sized.total**3
            peak += 8 * 4 * sized.sides * sized.total
    return SiteGroup(
        len(paths),
        paths[0],
        (m, n),
        ranks,
        path.name,
        path.why,
        exact,
        k,
        int(flops),
        int(peak),
        tuple(notes),
    )


def _bound(
    groups: Sequence[SiteGroup], modules: Sequence[str], parents: Sequence[Pack], request: CompositionRequest
) -> int:
    """Returns an upper bound on memory in bytes: all factors widened and scaled, all results twice, the
    current batch, and the buffers of each thread.
    """

    def numbers(rank: int, group: SiteGroup) -> int:
        return group.sites * rank * sum(group.shape)

    stored = sum(numbers(sum(group.ranks), group) for group in groups)
    results = 2 * 4 * sum(numbers(group.rank, group) for group in groups)
    spectra = 2 * results if request.budget is not None else 0
    batch = 3 * 4 * min(BATCH, stored) * 2
    per_thread = workers() * (max((group.bytes for group in groups), default=0) + _BLOCKS)
    whole = (
        3 * sum(value.nbytes for pack in parents for part in pack.full().values() for value in part.values())
        if modules
        else 0
    )
    return int(8 * stored + results + spectra + batch + per_thread + whole)
