"""The steps of a composition by a rule: check the packs, gather their sites, combine every site, build a pack
from the results; or, where all packs are of one method that has such sums, combine them within that method.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ..adapter_methods import Method, Site, Tensors
from ..adapter_methods.lora import lora
from ..adapter_methods.nodes.composed import pack_config
from ..errors import ConfigError, NonFinite, NothingToDo
from ..io import Progress, in_order, one_thread_each, workers
from ..lowrank import Cut, Factors, LeadingSpectrum, Loss
from ..manifest import manifest as m
from ..pack import Pack, descend
from ..paths import StrPath
from .arguments import BySite, check_by_site, checked_weights, opened_base
from .budget import FULL_RANK, check_budget, parameters, ranks_within
from .compatibility import common_base, require_same_site
from .full_modules import CombinedModules, apply_policy
from .result import as_lora, build_composed, describe_losses
from .rules.lorahub import search_weights
from .rules.rule import RULES, Arguments, Rule
from .sites import JointSite, SiteValues, adapters_by_path, gather
from .statistics import Statistics, of_packs
from .truncate import cut_all, decompose_all, finite

Score = Callable[[Pack], float]
"""Scores a pack; higher is better."""
BATCH = 1 << 20
"""The numbers of factors that a thread combines at a time. A core's cache holds fewer, but with smaller
batches threads wait for the interpreter's lock between calls, which costs more.
"""
LARGEST = float(np.finfo(np.float32).max) ** 2
"""The squared norm of a change beyond which its entries may overflow float32, although those of its factors,
which share the size, would not.
"""


class RankChosen(UserWarning):
    """Warns which rank compose took because the rule's result has no low rank and the caller set none, and
    how much energy that loses.
    """

    def __init__(self, rule: str, rank: int, energy_lost: float) -> None:
        super().__init__(
            f"the result of the rule {rule} has no low rank of its own, and no rank was given: the largest "
            f"of the packs, rank={rank}, was taken, which leaves out {100 * energy_lost:.1f} % of the "
            "change's energy; --rank (or --energy, --budget) says what to keep"
        )
        self.rank, self.energy_lost = rank, energy_lost


class SiteOutcome(NamedTuple):
    """The change at every site and its truncation loss; None for a site that got no rank under a budget."""

    changes: list[Factors | None]
    losses: dict[str, Loss]


@dataclass(frozen=True)
class CompositionRequest:
    """The options of :func:`~adapterpack.composing.pipeline.compose`: everything that a recipe repeats."""

    rule: str = "linear"
    weights: Sequence[float] | None = None
    params: Arguments = field(default_factory=dict)
    rank: int | None = None
    energy: float | None = None
    budget: float | None = None
    whole: str = "average"
    by_site: BySite | None = None
    rank_is_default: bool = False

    def __post_init__(self) -> None:
        check_budget(self.budget, self.cut)

    @property
    def cut(self) -> Cut:
        """The truncation limits of every site, apart from a budget."""
        return Cut(self.rank, self.energy)

    @property
    def cuts(self) -> bool:
        """Whether any option limits the rank."""
        return bool(self.cut.settings) or self.budget is not None

    def with_seed(self, seed: int) -> CompositionRequest:
        """Returns the request with the seed among the parameters of a rule that draws random numbers, if it
        has none.

        Raises:
            UnknownName: there is no such rule.
        """
        if "seed" not in RULES[self.rule].parameters:
            return self
        return replace(self, params={"seed": seed, **self.params})

    def with_rank(self, packs: Sequence[Pack], weights: Sequence[float]) -> CompositionRequest:
        """Returns the request with the largest rank of the packs if its rule gives changes without a low rank
        and no option limits the rank.

        Raises:
            UnknownName: there is no such rule.
            ConfigError: none of the packs has a rank.
        """
        if self.cuts or not RULES[self.rule].cut:
            return self
        present = [pack for pack, weight in zip(packs, weights, strict=True) if weight] or packs
        rank = max((group.rank or 0 for pack in present for group in pack.manifest.groups), default=0)
        if not rank:
            raise ConfigError(
                "the result of this rule has no low rank of its own, and the packs have none either",
                where=f"rule {self.rule}",
                expected="a rank or an energy, or a budget",
                remedy="give --rank (rank=), the rank that the pack may have, --energy, the share that it "
                "must hold, or --budget, the numbers that it may have in all",
            )
        return replace(self, rank=rank, rank_is_default=True)


class CompositionWork(NamedTuple):
    """A composition after checking. ``order`` is the order in which the packs are combined: by
    name, whatever order the caller gave. ``sites`` and ``statistics`` are set by :meth:`with_sites`.
    """

    request: CompositionRequest
    rule: Rule
    arguments: Arguments
    parents: tuple[Pack, ...]
    order: tuple[int, ...]
    weights: tuple[float, ...]
    base: m.Base
    sites: tuple[JointSite, ...] = ()
    statistics: tuple[Statistics, ...] = ()

    @property
    def ordered(self) -> list[Pack]:
        """The packs in the order in which they are combined."""
        return [self.parents[index] for index in self.order]

    def with_sites(
        self, base: StrPath | None, statistics: Sequence[Statistics | StrPath] | None
    ) -> CompositionWork:
        """Returns the work with the sites of all packs, and with statistics of the packs where the rule needs
        them.

        Raises:
            ConfigError, FormatError: the statistics are not those that the rule needs.
            BaseMismatch, SiteNotFound: ``base`` is another base than the packs'.
            Unsupported: a change that has no factors, or a site that two packs describe differently.
        """
        measured = of_packs(statistics, self.parents, self.rule.statistics, self.request.rule)
        checkpoint, ordered = opened_base(base, self.ordered)
        sites = gather(
            ordered,
            self.values_at,
            base=checkpoint,
            cut=approximation(self.request),
            statistics=None if measured is None else [measured[index] for index in self.order],
        )
        if lost := set(self.request.by_site or ()) - {joint.site.path for joint in sites}:
            raise ConfigError(
                "the base calls a layer by another name than the packs do, which has values of its own",
                where=sorted(lost)[0],
                remedy="leave --base (base=) out, or name the site as the base does",
            )
        return self._replace(sites=tuple(sites), statistics=tuple(measured or ()))

    def values_at(self, path: str) -> SiteValues:
        """Returns the weights and own parameters of the packs at a site, in the order in which they are
        combined.
        """
        given = (self.request.by_site or {}).get(path, {})
        return SiteValues(
            [float(given.get("weight", self.weights)[index]) for index in self.order],
            [
                {name: float(values[index]) for name, values in given.items() if name != "weight"}
                for index in self.order
            ],
        )

    def weighing(self, weights: Sequence[float]) -> CompositionWork:
        """Returns the same work under other weights, one for each pack in the caller's order."""
        ordered = [float(weights[index]) for index in self.order]
        sites = tuple(
            joint._replace(
                terms=tuple(
                    term._replace(weight=weight) for term, weight in zip(joint.terms, ordered, strict=True)
                )
            )
            for joint in self.sites
        )
        return self._replace(weights=tuple(map(float, weights)), sites=sites)


def prepare(parents: Sequence[Pack], request: CompositionRequest) -> CompositionWork:
    """Checks the request and that the packs have one base, without reading any site yet.

    Raises:
        NothingToDo, ConfigError, UnknownName, BaseMismatch, Unsupported: as for
            :func:`~adapterpack.composing.pipeline.compose`.
    """
    rule = RULES[request.rule]
    arguments = rule.arguments(request.params)
    weights = checked_weights(parents, request.weights, unit=rule.unit)
    if request.by_site:
        check_by_site(request.by_site, parents, rule, arguments)
    # a fixed order makes the tensors the same to the bit, whatever order the caller gives
    order = sorted(
        range(len(parents)), key=lambda index: (parents[index].name, parents[index].id, weights[index])
    )
    return CompositionWork(
        request.with_rank(parents, weights),
        rule,
        arguments,
        tuple(parents),
        tuple(order),
        tuple(weights),
        common_base(parents),
    )


def compose_by_rule(
    parents: Sequence[Pack],
    request: CompositionRequest,
    name: str,
    base: StrPath | None,
    statistics: Sequence[Statistics | StrPath] | None,
    score: Score | None = None,
    progress: Progress | None = None,
) -> Pack:
    """Combines packs as a request says, within their own method where that has such sums; ``score`` is for a
    rule that searches for its weights.

    Raises:
        AdapterpackError: as for :func:`~adapterpack.composing.pipeline.compose`.
    """
    work = prepare(parents, request)
    if statistics is None and score is None and (pack := combine_within_method(work, name)) is not None:
        return pack
    work = work.with_sites(base, statistics)
    if work.rule.search:
        work = _search_weights(work, score, name)
    elif score is not None:
        raise ConfigError(
            "this rule does not search for weights",
            where=f"rule {request.rule}",
            expected="lorahub, if weights are to be searched for",
            remedy="leave the score out",
        )
    return build_pack(work, combine_sites(work, progress), name)


def _search_weights(work: CompositionWork, score: Score | None, name: str) -> CompositionWork:
    """Returns the work with the weights that score best; with the weights that the caller set, if it set
    them, as a recipe does.
    """
    if score is None:
        if work.request.weights is None:
            raise ConfigError(
                "this rule searches for its weights, and nothing says what is good",
                where=f"rule {work.request.rule}",
                expected="a score, or weights",
                remedy="give score=FUNCTION, or --score EXECUTABLE; it gets a pack, and more is better",
            )
        return work
    if work.request.weights is not None:
        raise ConfigError(
            "weights that are given are not searched for",
            where=f"rule {work.request.rule}",
            expected="a score, or weights",
            remedy="leave one of them out",
        )

    def judged(weights: np.ndarray) -> float:
        tried = work.weighing(list(weights))
        return score(build_pack(tried, combine_sites(tried), name))

    return work.weighing(search_weights(judged, len(work.parents), **work.arguments))


def combine_within_method(work: CompositionWork, name: str) -> Pack | None:
    """Returns the weighted sum of the packs' changes as a pack of their own method, exactly; None where that
    method has no such sums, or the request asks for a LoRA.

    This works if the rule's coefficients follow from the weights alone, nothing is truncated, all packs are
    of one method that has such sums (:class:`~adapterpack.adapter_methods.core.base.Overrides`), and they
    share one config at each site. The weights of PEFT's ``add_weighted_adapter`` for (IA)^3 give the same
    numbers where their sum is 1; here a weight multiplies the change, as in every rule.

    Raises:
        ConfigError, Unsupported: as for :func:`~adapterpack.composing.pipeline.compose`.
        NothingToDo: the combined change is zero everywhere.
        NonFinite: it is too large for float32.
    """
    method = common_sums(work.parents, work.request)
    if method is None or work.rule.coefficients is None:
        return None
    combine = method.overrides["linear_combination"]
    adapters: dict[Site, tuple[Any, Tensors]] = {}
    weights = {}
    changed = False
    for path, present in adapters_by_path(work.ordered).items():
        coefficients = work.rule.coefficients(work.values_at(path).weights, **work.arguments)
        params = combine([(adapter.wide, coefficients[index]) for index, adapter in present.items()])
        if not all(np.isfinite(value).all() for value in params.values()):
            raise _too_large(path)
        changed = changed or any(bool((params[key] != value).any()) for key, value in combine([]).items())
        first, *_ = present.values()
        adapters[first.site] = first.config, params
        weights[path] = next((one.weight for one in present.values() if one.weight is not None), None)
    whole = _combine_modules(work, changed)
    details = {
        **work.arguments,
        **({"whole": work.request.whole} if whole.modules else {}),
        **({"by_site": work.request.by_site} if work.request.by_site else {}),
    }
    lineage = descend(work.request.rule, work.parents, details, work.weights)
    return build_composed(name, method, adapters, work.base, whole, work.parents, weights, lineage)


def common_sums(parents: Sequence[Pack], request: CompositionRequest) -> Method | None:
    """Returns the method that all packs share if the request is for a sum that this method can represent;
    else None.
    """
    methods = {method.name: method for parent in parents for method in parent.methods}
    method = next(iter(methods.values())) if len(methods) == 1 else None
    if (
        RULES[request.rule].coefficients is None
        or request.cuts
        or method is None
        or "linear_combination" not in method.overrides
    ):
        return None
    for present in adapters_by_path(parents).values():
        (index, first), *others = present.items()
        for other, adapter in others:
            require_same_site((parents[index].name, first.site), (parents[other].name, adapter.site))
            if pack_config(adapter.config) != pack_config(first.config):
                return None
    return method


def combine_sites(work: CompositionWork, progress: Progress | None = None) -> SiteOutcome:
    """Combines every site, and truncates it to the rank that the request allows.

    Raises:
        NonFinite: a change is too large for float32.
        NothingToDo: the budget holds no rank at all.
    """
    results: list[Any] = [None] * len(work.sites)
    batches = _batches(work.sites)
    done = 0
    total = 4 * sum(joint.numbers for joint in work.sites)
    # numpy would only warn of an overflow; the batch raises with the site's name
    with one_thread_each(), np.errstate(over="ignore", invalid="ignore"):
        combine = work.rule.prepared([joint.terms for joint in work.sites], work.arguments)

        def combine_batch(batch: Sequence[int]) -> Sequence[Any]:
            sites = [work.sites[index] for index in batch]
            combined = [combine(joint.terms) for joint in sites]
            made: Sequence[Any]
            if work.request.budget is None:
                made = cut_all(combined, work.request.cut, work.rule.reduce)
                fitting = [
                    finite(change) and (loss is None or loss.total <= LARGEST) for change, loss in made
                ]
            else:
                made = decompose_all(combined, [_largest_rank(work, joint) for joint in sites])
                fitting = [decomposition.total <= LARGEST for decomposition in made]
            for fits, joint in zip(fitting, sites, strict=True):
                if not fits:
                    raise _too_large(joint.site.path)
            return made

        for batch, made in zip(batches, in_order(combine_batch, batches), strict=True):
            for index, result in zip(batch, made, strict=True):
                results[index] = result
            if progress is not None:
                done += 4 * sum(work.sites[index].numbers for index in batch)
                progress(done, total)
    # the order in which the losses are added up decides their last bit
    order: Iterable[int] = itertools.chain.from_iterable(batches)
    if work.request.budget is not None:
        results, order = _share_budget(work, results), range(len(results))
    losses = {work.sites[index].site.path: results[index][1] for index in order}
    return SiteOutcome(
        [change for change, _ in results], {path: loss for path, loss in losses.items() if loss is not None}
    )


def _share_budget(
    work: CompositionWork, decompositions: Sequence[LeadingSpectrum]
) -> list[tuple[Factors | None, Loss]]:
    """Returns the change at every site, at the rank that it gets under the budget, and its loss."""
    ranks = ranks_within(
        _budget(work),
        [decomposition.spectrum.S for decomposition in decompositions],
        [sum(joint.shape) for joint in work.sites],
        work.request.rank,
    )
    results = []
    for decomposition, rank in zip(decompositions, ranks, strict=True):
        factors, inside = decomposition.spectrum.cut(rank)
        loss = Loss(inside.tail + decomposition.left_out, decomposition.total)
        results.append((factors if rank else None, loss))
    return results


def _budget(work: CompositionWork) -> int:
    """Returns the number of parameters that the budget allows for all factors together."""
    return parameters(work.request.budget or 0.0, sum(joint.numbers for joint in work.sites))


def build_pack(work: CompositionWork, outcome: SiteOutcome, name: str) -> Pack:
    """Builds the pack of the combined changes, with its lineage.

    Warns:
        RankChosen: the rank is the packs' largest, because the caller set none.

    Raises:
        NothingToDo: nothing is left.
        Unsupported: the policy for modules trained whole cannot be followed.
    """
    whole = _combine_modules(
        work, any(change is not None and np.any(change.A) and np.any(change.B) for change in outcome.changes)
    )
    details = _lineage_params(work, outcome)
    if work.request.rank_is_default:
        warnings.warn(
            RankChosen(work.request.rule, work.request.rank or 0, details["truncation"]["total"] ** 2),
            stacklevel=4,
        )
    kept = [
        (joint, change)
        for joint, change in zip(work.sites, outcome.changes, strict=True)
        if change is not None
    ]
    return build_composed(
        name,
        lora,
        {joint.site: as_lora(change) for joint, change in kept},
        work.base,
        whole,
        work.parents,
        {joint.site.path: joint.weight for joint, _ in kept},
        descend(work.request.rule, work.parents, details, work.weights),
    )


def _combine_modules(work: CompositionWork, changed: bool) -> CombinedModules:
    """Combines the fully trained modules.

    Raises:
        NothingToDo: there are none, and no site ``changed``.
    """
    weights = [work.weights[index] for index in work.order]
    whole = apply_policy(work.request.whole, work.ordered, weights)
    if not changed and not whole.modules:
        raise NothingToDo(
            "the combined change is zero at every site",
            where=", ".join(parent.name for parent in work.parents),
            found=f"weights {', '.join(f'{weight:g}' for weight in work.weights)}",
            remedy="choose weights under which something is left",
        )
    return whole


def _lineage_params(work: CompositionWork, outcome: SiteOutcome) -> dict[str, Any]:
    """Returns the lineage's params besides parents and weights: all options of the request, and the measured
    loss.
    """
    request = work.request
    details = {**work.arguments, **request.cut.settings}
    if request.budget is not None:
        details["budget"] = request.budget
    if any(parent.manifest.full_groups for parent in work.parents):
        details["whole"] = request.whole
    if request.by_site:
        details["by_site"] = request.by_site
    if work.statistics:
        details["statistics"] = [statistics.digest for statistics in work.statistics]
    if request.cuts:
        left_out = [
            joint.site.path
            for joint, change in zip(work.sites, outcome.changes, strict=True)
            if change is None
        ]
        details |= describe_losses(work.sites, outcome.losses, left_out)
    return details


def _largest_rank(work: CompositionWork, joint: JointSite) -> int:
    """Returns the largest rank that a site can get under the budget."""
    m, n = joint.shape
    return max(1, min(work.request.rank or FULL_RANK, FULL_RANK, m, n, _budget(work) // (m + n)))


def approximation(request: CompositionRequest) -> Cut:
    """Returns the truncation limits for approximating changes without a low rank before combining: finer than
    those of the result, which is truncated last.
    """
    if request.budget is not None and request.rank is None:
        return Cut(FULL_RANK)
    return Cut(
        None if request.rank is None else 2 * request.rank,
        None if request.energy is None else 1 - (1 - request.energy) / 4,
    )


def _batches(sites: Sequence[JointSite]) -> list[list[int]]:
    """Splits the sites into batches of one shape and about :data:`BATCH` numbers; returns lists of site
    indices. A thread combines one batch at a time.

    Where the sites fill several batches, all threads get the same number, so that no thread waits for another
    at the end.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, joint in enumerate(sites):
        alike.setdefault((joint.shape, joint.ranks), []).append(index)
    batches = []
    for members in alike.values():
        lists = -(-len(members) * sites[members[0]].numbers // BATCH)
        if lists > 1:
            lists = -(-lists // workers()) * workers()
        size = max(1, -(-len(members) // max(1, lists)))
        batches += [members[start : start + size] for start in range(0, len(members), size)]
    return batches


def _too_large(path: str) -> NonFinite:
    return NonFinite(
        "the combined change is too large for float32", where=path, remedy="choose smaller weights"
    )
