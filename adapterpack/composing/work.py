"""A composition in three steps: what was asked is made ready, the sites are combined, and what came out becomes a pack."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..adapter_methods.lora import lora
from ..errors import ConfigError, NonFinite, NothingToDo
from ..io.threads import in_order, one_thread_each, workers
from ..lowrank.range_finder import Found
from ..lowrank.space import Factors
from ..lowrank.spectra import Loss
from ..lowrank.truncation import Cut, shared_out
from ..manifest import manifest as m
from ..pack.lineage import descended
from ..pack.pack import Pack, build
from .arguments import checked_weights, opened_base
from .compatibility import common_base
from .finish import decomposed, finished, finite
from .full_modules import decided
from .result import as_lora, base_tensors, truncation
from .rules.rule import RULES, Rule
from .sites import Place, gather

if TYPE_CHECKING:
    from .statistics import Statistics

Progress = Callable[[int, int], None]
"""Is told the bytes of factors that are combined, and those in all."""
BATCH = 1 << 20
"""Numbers of factors that a thread combines at a time. A core's own cache holds fewer, but then the threads wait more for the interpreter's
lock between calls than the cache is worth."""
LARGEST = float(np.finfo(np.float32).max) ** 2
"""The squared size of a change beyond which its numbers may not fit into float32, though its factors, which share the size, would."""
FULL_RANK = 256
"""The rank up to which a change without a low rank takes part in a budget."""


class RankChosen(UserWarning):
    """Says which rank was taken where a rule's result has no low rank and none was given, and what that leaves out."""

    def __init__(self, rule: str, rank: int, energy_lost: float) -> None:
        super().__init__(f"the result of the rule {rule} has no low rank of its own, and no rank was given: the largest of the packs, "
                         f"rank={rank}, was taken, which leaves out {100 * energy_lost:.1f} % of the change's energy; --rank (or --energy, "
                         "--budget) says what to keep")
        self.rank, self.energy_lost = rank, energy_lost


class Combined(NamedTuple):
    """What came out at every site: the change, and what was cut off; a site that got no rank under a budget has None."""

    changes: list[Factors | None]
    losses: dict[str, Loss]


@dataclass(frozen=True)
class Request:
    """What is asked of packs, as :func:`~adapterpack.composing.pipeline.compose` takes it: everything that a recipe repeats."""

    rule: str = "linear"
    weights: tuple[float, ...] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    energy: float | None = None
    budget: float | None = None
    whole: str = "average"
    rank_is_default: bool = False

    def __post_init__(self) -> None:
        if self.budget is not None and self.energy is not None:
            raise ConfigError("budget and energy both say where to cut", where="budget", expected="one of them", remedy="give one of them")
        if self.budget is not None and not (np.isfinite(self.budget) and self.budget > 0):
            raise ConfigError("a budget is a number of parameters, or below 1 a share of those of all packs", where="budget",
                              expected="above 0", found=self.budget, remedy="give a number such as 500000, or 0.5")

    @property
    def cut(self) -> Cut:
        """How much of every site is kept, but for a budget."""
        return Cut(self.rank, self.energy)

    def with_rank(self, packs: Sequence[Pack], weights: Sequence[float]) -> Request:
        """The request with the largest rank of the packs, if its rule makes changes of no low rank and nothing says how much is kept.

        Raises:
            UnknownName: there is no such rule.
            ConfigError: none of the packs has a rank.
        """
        if not RULES[self.rule].cut or self.cut.asked or self.budget is not None:
            return self
        present = [pack for pack, weight in zip(packs, weights, strict=True) if weight] or packs
        rank = max((group.rank or 0 for pack in present for group in pack.manifest.groups), default=0)
        if not rank:
            raise ConfigError("the result of this rule has no low rank of its own, and the packs have none either",
                              where=f"rule {self.rule}", expected="a rank or an energy, or a budget",
                              remedy="give the rank that the pack may have, such as rank=16, the share of the energy that it must hold, or "
                                     "the numbers that it may have in all")
        return replace(self, rank=rank, rank_is_default=True)


class Work(NamedTuple):
    """A composition made ready. ``order`` are the packs as they are combined: by their names, so that it does not matter how they came."""

    request: Request
    rule: Rule
    arguments: Mapping[str, Any]
    parents: tuple[Pack, ...]
    order: tuple[int, ...]
    weights: tuple[float, ...]
    base: m.Base
    places: tuple[Place, ...]
    statistics: tuple[Statistics, ...]

    def weighing(self, weights: Sequence[float]) -> Work:
        """The same under other weights, one a pack in the order in which they were given."""
        ordered = [float(weights[index]) for index in self.order]
        places = tuple(place._replace(terms=tuple(term._replace(weight=weight) for term, weight in zip(place.terms, ordered, strict=True)))
                       for place in self.places)
        return self._replace(weights=tuple(map(float, weights)), places=places)


def prepared(
    parents: Sequence[Pack], request: Request, base: str | os.PathLike[str] | None = None,
    statistics: Sequence[Statistics | str | os.PathLike[str]] | None = None,
) -> Work:
    """Everything read and checked; nothing is combined yet.

    Raises:
        NothingToDo, ConfigError, UnknownName, BaseMismatch, Unsupported, FormatError: see :func:`~adapterpack.composing.pipeline.compose`.
    """
    rule = RULES[request.rule]
    arguments = rule.arguments(request.params)
    weights = checked_weights(parents, request.weights, unit=rule.unit)
    request = request.with_rank(parents, weights)
    measured = None
    if statistics or rule.statistics:
        from .statistics import of_packs  # noqa: PLC0415 - few rules look at data

        measured = of_packs(statistics, parents, rule.statistics, request.rule)
    origin = common_base(parents)
    order = sorted(range(len(parents)), key=lambda index: (parents[index].name, parents[index].id, weights[index]))
    checkpoint, ordered = opened_base(base, [parents[index] for index in order])
    places = gather(ordered, [weights[index] for index in order], base=checkpoint, cut=_finer(request),
                    statistics=None if measured is None else [measured[index] for index in order])
    return Work(request, rule, arguments, tuple(parents), tuple(order), tuple(weights), origin, tuple(places), tuple(measured or ()))


def combined(work: Work, progress: Progress | None = None) -> Combined:
    """Every site combined, and cut as it was asked for.

    Raises:
        NonFinite: a change is too large for float32.
        NothingToDo: the budget holds no rank at all.
    """
    changes: list[Factors | None] = [None] * len(work.places)
    losses: dict[str, Loss] = {}
    spectra: dict[int, Found] = {}
    done, total = 0, sum(map(_read, work.places))
    with one_thread_each(), np.errstate(over="ignore", invalid="ignore"):  # told below, with the place
        combine = work.rule.prepared([place.terms for place in work.places], work.arguments)

        def made(batch: Sequence[int]) -> Sequence[Any]:
            places = [work.places[index] for index in batch]
            combined = [combine(place.terms) for place in places]
            if work.request.budget is not None:
                found = decomposed(combined, [_most(work, place) for place in places])
                _require_fitting([each.total <= LARGEST for each in found], places)
                return found
            results = finished(combined, work.request.cut, work.rule.reduce)
            _require_fitting([finite(change) and (loss is None or loss.total <= LARGEST) for change, loss in results], places)
            return results

        batches = _batches(work.places)
        for batch, results in zip(batches, in_order(made, batches), strict=True):
            for index, result in zip(batch, results, strict=True):
                if isinstance(result, Found):
                    spectra[index] = result
                    continue
                changes[index], loss = result
                if loss is not None:
                    losses[work.places[index].site.path] = loss
            if progress is not None:
                done += sum(_read(work.places[index]) for index in batch)
                progress(done, total)
    if work.request.budget is not None:
        costs = [sum(place.shape) for place in work.places]
        found = [spectra[index] for index in range(len(work.places))]
        ranks = shared_out([each.spectrum.S for each in found], costs, numbers(work), work.request.rank)
        if any(len(each.spectrum.S) for each in found) and not any(ranks):
            raise NothingToDo("the budget does not hold one rank at one site", where="budget", expected=f"at least {min(costs)} numbers",
                              found=numbers(work), remedy="give a larger budget")
        for index, (place, each, rank) in enumerate(zip(work.places, found, ranks, strict=True)):
            factors, inside = each.spectrum.cut(rank)
            changes[index] = factors if rank else None
            losses[place.site.path] = Loss(inside.tail + each.left_out, each.total)
    return Combined(changes, losses)


def _read(place: Place) -> int:
    """The bytes of a place's factors, for a bar."""
    return 4 * place.numbers


def numbers(work: Work) -> int:
    """The numbers that the budget allows all factors together."""
    budget = work.request.budget or 0.0
    own = sum(place.numbers for place in work.places)
    return int(budget * own) if budget < 1 else int(budget)


def packed(work: Work, found: Combined, name: str) -> Pack:
    """The pack of what came out, with its lineage.

    Warns:
        RankChosen: the rank is the packs' largest, because none was given.

    Raises:
        NothingToDo: nothing is left.
        Unsupported: the policy for modules trained whole cannot be followed.
    """
    ordered, weights = [work.parents[index] for index in work.order], [work.weights[index] for index in work.order]
    whole = decided(work.request.whole, ordered, weights)
    if not whole.modules and not any(change is not None and np.any(change.A) and np.any(change.B) for change in found.changes):
        raise NothingToDo("the combined change is zero at every site", where=", ".join(parent.name for parent in work.parents),
                          found=f"weights {', '.join(f'{weight:g}' for weight in work.weights)}",
                          remedy="choose weights under which something is left")
    details = _details(work, found)
    if work.request.rank_is_default:
        warnings.warn(RankChosen(work.request.rule, work.request.rank or 0, details["truncation"]["total"] ** 2), stacklevel=3)
    licenses = {parent.manifest.license for parent in work.parents}
    kept = [(place, change) for place, change in zip(work.places, found.changes, strict=True) if change is not None]
    return build(
        name,
        lora,
        {place.site: as_lora(change) for place, change in kept},
        task=whole.task,
        base=work.base,
        full=whole.modules,
        weights=base_tensors([place for place, _ in kept], work.parents),
        lineage=descended(work.request.rule, work.parents, details, work.weights),
        license=licenses.pop() if len(licenses) == 1 else None,
    )


def _details(work: Work, found: Combined) -> dict[str, Any]:
    """What the lineage says beside parents and weights: all that was asked for, and what it cost."""
    request = work.request
    details: dict[str, Any] = {**work.arguments, **request.cut.asked}
    if request.budget is not None:
        details["budget"] = request.budget
    if any(group.role == "full" for parent in work.parents for group in parent.manifest.groups):
        details["whole"] = request.whole
    if work.statistics:
        details["statistics"] = [each.digest for each in work.statistics]
    if request.cut.asked or request.budget is not None:
        details["truncation"] = truncation(found.losses)
    if left_out := [place.site.path for place, change in zip(work.places, found.changes, strict=True) if change is None]:
        details["left_out"] = left_out
    if approximated := {place.site.path: place.loss for place in work.places if place.loss.tail}:
        details["approximation"] = truncation(approximated)
    return details


def _most(work: Work, place: Place) -> int:
    """The largest rank that a site can get under the budget."""
    m, n = place.shape
    return max(1, min(FULL_RANK, m, n, numbers(work) // (m + n), *([] if work.request.rank is None else [work.request.rank])))


def _finer(request: Request) -> Cut:
    """How changes without a low rank are approximated before they are combined: finer than the result, so that it is what is cut last."""
    if request.budget is not None and request.rank is None:
        return Cut(FULL_RANK)
    return Cut(None if request.rank is None else 2 * request.rank, None if request.energy is None else 1 - (1 - request.energy) / 4)


def _batches(places: Sequence[Place]) -> list[list[int]]:
    """The places by their numbers, in lists of one shape and about :data:`BATCH` numbers: what a thread works on at a time.

    Of places that fill several lists every thread gets as many, so that none waits for another at the end.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, place in enumerate(places):
        alike.setdefault((place.shape, place.ranks), []).append(index)
    batches = []
    for members in alike.values():
        lists = -(-len(members) * places[members[0]].numbers // BATCH)
        if lists > 1:
            lists = -(-lists // workers()) * workers()
        each = max(1, -(-len(members) // max(1, lists)))
        batches += [members[start : start + each] for start in range(0, len(members), each)]
    return batches


def _require_fitting(fitting: Sequence[bool], places: Sequence[Place]) -> None:
    for fits, place in zip(fitting, places, strict=True):
        if not fits:
            raise NonFinite("the combined change is too large for float32", where=place.site.path, remedy="choose smaller weights")
