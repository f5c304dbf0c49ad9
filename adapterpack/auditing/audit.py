"""Measures how packs affect the base and each other, site by site and in total, and gives a verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..adapter_methods import Site, Tensors, to_matrix
from ..base import Checkpoint
from ..base.dtypes import parse
from ..composing.arguments import checked_weights, opened_base
from ..composing.as_factors import FactoredChange, represent
from ..composing.compatibility import SIDE_BY_SIDE, common_base, common_task, require_same_site
from ..composing.full_modules import comparable
from ..composing.plan import plan
from ..errors import AdapterpackError, NothingToDo, Unsupported
from ..io import DTYPES, FLOATS, Progress
from ..lowrank import Cut, Loss, Term, zero
from ..lowrank.truncation import require_count
from ..manifest import manifest as m
from ..pack import Adapter, Pack, as_pack
from ..paths import StrPath
from . import verdict
from .audit_report import Audit, AuditedModule, AuditedSite, Skipped
from .measures import measure
from .scan import SAMPLE, fold_losses, norm_of, rows_of, scan
from .screen import RATE, screen

RANKS = (1, 2, 4, 8, 16, 32)
"""The ranks for which the loss of a truncation is reported by default."""
_APPROXIMATED = Cut(rank=256, energy=0.999)
"""How to approximate a change without a low rank by factors."""


class _Part(NamedTuple):
    """One pack's group at a site, with the parameters that all sites of the group share."""

    pack: Pack
    group: m.Group
    shared: Tensors


def audit(
    packs: Sequence[Pack | StrPath],
    *,
    weights: Sequence[float] | None = None,
    base: StrPath | None = None,
    ranks: Sequence[int] = RANKS,
    dtypes: Sequence[str] = ("bf16", "fp16"),
    exact: bool = False,
    clean: Sequence[Pack | StrPath] | None = None,
    false_alarms: float = RATE,
    progress: Progress | None = None,
) -> Audit:
    """Measures what packs do to the base and to each other, and gives a verdict: energy, rank, interference,
    shared subspaces, sign conflicts, and what merging or a lower rank would lose.

    Works site by site, without torch; memory does not grow with the number of sites beyond what is reported.
    One pack alone is valid too.

    Args:
        packs: the packs, or their folders; all of one base, of any methods that change weights.
        weights: one number a pack, of any sign, under which the sum is judged; equal and of sum 1 by default.
        base: the checkpoint of the base model: for the size of a change relative to its weight, for the loss
            of a fold, and for methods whose change depends on the weight (DoRA, OFT, ...).
        ranks: the ranks for which to report the loss of truncating the weighted sum.
        dtypes: the dtypes in which the weighted sum is folded into the base, to measure the loss by rounding;
            needs ``base``.
        exact: looks at all entries for conflicts of sign and for the loss of a fold; else at about a million
            at a site, drawn by its path.
        clean: packs of your own, all of one recipe, with which each pack is screened for hidden training.
        false_alarms: the share of clean packs that the screen may call unusual.
        progress: called with (bytes done, bytes in all).

    Returns:
        The figures by site, all together, and in words. ``to_json()`` is what the command prints.

    Raises:
        NothingToDo: there are no packs, or none changes anything that can be measured.
        BaseMismatch: the packs belong to different bases, or ``base`` is another.
        ConfigError: wrong weights, ranks or dtypes, or clean packs that are too few or of several kinds.
        NonFinite: a change that is screened is too large to have a spectrum.

    Example:
        >>> audit(["packs/tickets", "packs/emails"]).verdict.summary  # doctest: +SKIP
        'The packs hardly meet: add them up.'
    """
    factors = checked_weights(packs, weights)
    for rank in ranks:
        require_count(rank, "ranks")
    codes = list(dict.fromkeys(parse(name) for name in dtypes))
    loaded = [as_pack(pack) for pack in packs]
    common_base(loaded)
    screened = screen(loaded, list(map(as_pack, clean)), false_alarms) if clean is not None else None
    checkpoint, loaded = opened_base(base, loaded)
    union = _union(loaded)
    costs = {path: _bytes(parts, checkpoint) for path, parts in union.items()}
    done = 0
    total = max(1, sum(costs.values()))
    sites = []
    skipped: list[Skipped] = []
    for path, parts in union.items():
        site = _site(path, parts, factors, checkpoint, sorted(set(ranks)), codes, exact, skipped)
        sites += [site] if site is not None else []
        done += costs[path]
        if progress is not None:
            progress(done, total)
    whole = list(_whole(loaded))
    if not sites and not whole:
        reason = f": {skipped[0].reason}" if skipped else ""
        raise NothingToDo(
            f"no change of these packs can be measured{reason}",
            where=", ".join(pack.name for pack in loaded),
            remedy="audit packs that change weights",
        )
    base_name, folded = (None, ()) if checkpoint is None else (checkpoint.name, tuple(codes))
    obstacles = [*_obstacles(loaded), *(module.refusal for module in whole if module.refusal is not None)]
    figures = Audit(
        tuple(loaded),
        tuple(factors),
        base_name,
        tuple(sorted(set(ranks))),
        folded,
        tuple(sites),
        tuple(skipped),
        tuple(whole),
        tuple(dict.fromkeys(obstacles)),
        screen=screened,
    )
    figures = dataclasses.replace(figures, refused=dict(_refusals(loaded, verdict.of(figures).rules, base)))
    return dataclasses.replace(figures, verdict=verdict.of(figures))


def _union(packs: Sequence[Pack]) -> dict[str, list[_Part | None]]:
    """Maps every path that a pack adapts to the packs' groups there, in the order in which the paths first
    appear.
    """
    by_path: dict[str, list[_Part | None]] = {}
    for index, pack in enumerate(packs):
        shared = pack.shared()
        for group in pack.groups:
            if group.role == "adapter":
                by_path.setdefault(group.path, [None] * len(packs))[index] = _Part(pack, group, shared)
    return by_path


def _bytes(parts: Sequence[_Part | None], base: Checkpoint | None) -> int:
    """Estimates the cost of a site: the bytes of its tensors and of its base weight."""
    tensors = sum(
        value.nbytes
        for part in parts
        if part is not None
        for value in part.pack.params(part.group.path).values()
    )
    group = next(part.group for part in parts if part is not None)
    weight = None if base is None else base.weight_name(group.path, group.weight)
    return tensors + (base.tensors[weight].nbytes if base is not None and weight is not None else 0)


def _site(
    path: str,
    parts: Sequence[_Part | None],
    weights: Sequence[float],
    base: Checkpoint | None,
    ranks: Sequence[int],
    dtypes: Sequence[str],
    exact: bool,
    skipped: list[Skipped],
) -> AuditedSite | None:
    changes: list[FactoredChange | None] = []
    first = None
    weight_name = None
    for part in parts:
        changes.append(None)
        if part is None:
            continue
        try:
            adapter = _adapter(part)
            if first is not None:
                require_same_site(first, (part.pack.name, adapter.site), "audit")
            changes[-1] = represent(adapter, base=base, cut=_APPROXIMATED)
        except Unsupported as error:
            skipped.append(Skipped(part.pack.name, path, str(error)))
            continue
        first = first or (part.pack.name, adapter.site)
        weight_name = weight_name or adapter.weight
    if first is None:
        return None
    height, n = next(change.shape for change in changes if change is not None)
    terms = [
        Term(*(zero(height, n) if change is None else change.factors), weight)
        for change, weight in zip(changes, weights, strict=True)
    ]
    rows = rows_of(path, height, n, None if exact else SAMPLE)
    measures, spectra = measure(terms, scan(terms, rows), ranks)
    weight = None if base is None else _weight(base, path, weight_name, first[1], (height, n))
    if weight is not None:
        measures = dataclasses.replace(
            measures, base=norm_of(weight), folds=fold_losses(terms, weight, rows, dtypes)
        )
    present = [change for change in changes if change is not None]
    loss = Loss(sum(change.loss.tail for change in present), sum(change.loss.total for change in present))
    return AuditedSite(
        path, (height, n), len(rows), measures, tuple(spectrum.S for spectrum in spectra), loss.relative
    )


def _adapter(part: _Part) -> Adapter:
    """Returns one site of a pack with its parameters, including the shared ones."""
    pack, group, shared = part
    common = shared if group.method is None else {}
    return Adapter(
        pack.site(group),
        pack.config_at(group),
        {**common, **pack.params(group.path)},
        group.weight,
        pack.method_of(group),
    )


def _weight(
    base: Checkpoint, path: str, weight_name: str | None, site: Site, shape: tuple[int, int]
) -> np.ndarray | None:
    """Returns the base weight as ``[out, in]``, a view of the mapped file; None if it is not a numeric tensor
    of this shape.
    """
    name = base.weight_name(path, weight_name)
    if name is None or base.tensors[name].dtype not in FLOATS or base.tensors[name].dtype not in DTYPES:
        return None
    weight = to_matrix(site.kind, base.read(name))
    return weight if weight.shape == shape else None


def _whole(packs: Sequence[Pack]) -> Iterator[AuditedModule]:
    """Yields the fully trained modules, with what compose would do to each."""
    modules = [(pack, pack.full()) for pack in packs]
    paths = list(dict.fromkeys(path for _, module in modules for path in module))
    if not paths:
        return
    try:
        comparable(packs)
        common_task(packs)
        refusal = None
    except Unsupported as error:
        refusal = str(error)
    for path in paths:
        holders = [(pack.name, module[path]) for pack, module in modules if path in module]
        numbers = max(sum(value.size for value in module.values()) for _, module in holders)
        yield AuditedModule(path, tuple(name for name, _ in holders), numbers, refusal)


def _refusals(packs: Sequence[Pack], rules: Sequence[str], base: StrPath | None) -> Iterator[tuple[str, str]]:
    """Returns those of ``rules`` by which compose would refuse the packs without further options, with the
    reasons.
    """
    for rule in rules:
        try:
            plan(packs, rule=rule, base=base)
        except AdapterpackError as error:
            yield rule, str(error)


def _obstacles(packs: Sequence[Pack]) -> Iterator[str]:
    """Yields the reasons why compose would refuse these packs under any rule."""
    for check in (common_task, comparable):
        try:
            check(packs)
        except Unsupported as error:
            yield str(error)
    for pack in packs:
        if any(method.kind != "weight" or method.config.composition is not None for method in pack.methods):
            yield f"{pack.name} is not a plain change of weights, which compose needs: {SIDE_BY_SIDE}."
