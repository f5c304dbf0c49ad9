"""Reduces the rank of a pack: finds the best approximation of its change, for each site alone or under one
budget for all sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..adapter_methods.lora import lora
from ..errors import ConfigError, NothingToDo
from ..io import FLOATS, dtype_name, one_thread_each, refuse_existing
from ..lowrank import Cut, Factors, Loss, Spectrum, Term, energy_of, stack, weighted_sum
from ..lowrank.spectra import spectra
from ..pack import Pack, as_pack, descend
from ..paths import StrPath
from .arguments import chosen_name, opened_base
from .budget import FULL_RANK, check_budget, parameters, ranks_within
from .full_modules import CombinedModules
from .result import as_lora, build_composed, describe_losses
from .sites import JointSite, SiteValues, gather


def resize(
    pack: Pack | StrPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    sv_ratio: float | None = None,
    sv_cumulative: float | None = None,
    sv_fro: float | None = None,
    budget: float | None = None,
    base: StrPath | None = None,
    name: str | None = None,
    out: StrPath | None = None,
) -> Pack:
    """Reduces a pack to a LoRA of smaller rank: at every site the best approximation of the change, by its
    exact singular values.

    Args:
        pack: a pack or its folder. Any method whose change can be held by factors; a change without a low
            rank is approximated, and the lineage says so.
        rank: the most that any site keeps, with any of the criteria or alone.
        energy: the fewest singular values S that hold this share of sum S^2; the relative error is then at
            most sqrt(1 - energy).
        sv_ratio: the values above S_1 / sv_ratio.
        sv_cumulative: the fewest values that hold this share of sum S.
        sv_fro: the fewest values that hold this share of sqrt(sum S^2). These three are named as in kohya's
            resize script.
        budget: the numbers that all factors together may have, or if it is below 1 that share of what they
            are now. Ranks are shared out over all sites so that the total error is least; a site that gets
            none is left out of the pack, and listed.
        base: the checkpoint of the base model, for methods whose change depends on the weight (DoRA, OFT,
            ...).
        name: the new pack's name; by default that of ``out``, or the old one with ``-resized``.
        out: a new folder to write the pack to.

    Returns:
        The pack, of scale 1, its tensors in the dtype that they had. ``manifest.lineage.params`` hold the
        criteria and ``truncation``: the relative Frobenius error of the stored change at each site and in
        total; ``left_out`` and ``approximation`` where there is something to list. Modules that were trained
        whole stay as they are.

    Raises:
        ConfigError: no criterion is given, or one is out of range.
        NothingToDo: the change is zero, or the budget holds no rank at all.
        Unsupported: a change that no factors hold; the message says which and why.

    Example:
        >>> resize("packs/tickets", energy=0.99,
        ...     out="packs/small").manifest.lineage.params["truncation"]["total"]  # doctest: +SKIP
        0.083
    """
    cut = Cut(rank, energy, sv_ratio, sv_cumulative, sv_fro)
    if not cut.settings and budget is None:
        raise ConfigError(
            "nothing says how small the pack should become",
            where="resize",
            expected="rank, energy, sv_ratio, sv_cumulative, sv_fro or budget",
            remedy="give one, such as energy 0.99",
        )
    check_budget(budget, cut)
    refuse_existing(out)
    parent = as_pack(pack)
    called = chosen_name(
        name or (None if out is not None else f"{parent.name[:120]}-resized"), out, "resize", [parent]
    )
    with one_thread_each():
        checkpoint, on_base = opened_base(base, [parent])
        sites = gather(
            on_base,
            lambda path: SiteValues([1.0], [{}]),
            base=checkpoint,
            cut=cut if cut.settings else Cut(FULL_RANK),
        )
        decompositions = spectra([weighted_sum(joint.terms) for joint in sites])
    if not sites or not any(len(spectrum.S) for spectrum in decompositions):
        raise NothingToDo(
            "the change is zero at every site",
            where=parent.where,
            remedy="resize a pack that changes something",
        )
    ranks = _ranks(parent, sites, decompositions, cut, budget)
    dtype = _dtype(parent)
    kept = [
        (joint, spectrum, rank)
        for joint, spectrum, rank in zip(sites, decompositions, ranks, strict=True)
        if rank
    ]
    changes = [
        Factors(*(factor.astype(dtype) for factor in spectrum.cut(rank)[0])) for _, spectrum, rank in kept
    ]
    losses = dict(_losses(kept, changes, dtype))
    left_out = [joint.site.path for joint, rank in zip(sites, ranks, strict=True) if not rank]
    for joint, spectrum in zip(sites, decompositions, strict=True):
        if joint.site.path in left_out:
            whole = energy_of(spectrum.S) + joint.loss.tail
            losses[joint.site.path] = Loss(whole, whole)
    details = {
        **cut.settings,
        **({} if budget is None else {"budget": budget}),
        **describe_losses(sites, losses, left_out),
    }
    manifest = parent.manifest
    made = build_composed(
        called,
        lora,
        {joint.site: as_lora(change, dtype) for (joint, _, _), change in zip(kept, changes, strict=True)},
        manifest.base,
        CombinedModules(manifest.task, parent.full(), manifest.problem),
        [parent],
        {joint.site.path: joint.weight for joint, _, _ in kept},
        descend("resize", [parent], details),
    )
    return made if out is None else made.write(out)


def _ranks(
    parent: Pack,
    sites: Sequence[JointSite],
    decompositions: Sequence[Spectrum],
    cut: Cut,
    budget: float | None,
) -> list[int]:
    """Returns the rank that each site keeps. Without a budget it is at least 1, so that the pack still
    changes every site that it changed.
    """
    if budget is None:
        return [
            max(1, cut.kept(spectrum.S, energy_of(spectrum.S) + joint.loss.tail))
            for joint, spectrum in zip(sites, decompositions, strict=True)
        ]
    costs = [sum(joint.shape) for joint in sites]
    now = sum(value.size for joint in sites for value in parent.params(joint.site.path).values())
    return ranks_within(parameters(budget, now), [spectrum.S for spectrum in decompositions], costs, cut.rank)


def _dtype(pack: Pack) -> np.dtype[Any]:
    """Returns the floating dtype that all tensors of the adapters share, or float32 if they differ or are
    integers.
    """
    groups = {group.path for group in pack.manifest.adapter_groups}
    stored_names = {entry.dtype for entry in pack.manifest.tensors.values() if entry.group in groups}
    dtypes = {value.dtype for path in sorted(groups)[:1] for value in pack.params(path).values()}
    uniform = (
        len(stored_names) == len(dtypes) == 1
        and stored_names <= FLOATS
        and pack.manifest.quantization is None
    )
    return dtypes.pop() if uniform else np.dtype("f4")


def _losses(
    kept: Sequence[tuple[JointSite, Spectrum, int]], changes: Sequence[Factors], dtype: np.dtype[Any]
) -> list[tuple[str, Loss]]:
    """Returns the loss at every site: the singular values beyond the cut, or for a narrow dtype the full
    error of the stored factors.
    """
    if dtype_name(dtype) in {"F32", "F64"}:
        tails = [energy_of(spectrum.S[rank:]) for _, spectrum, rank in kept]
    else:
        missed = [
            stack(
                [
                    Term(change.A.astype(np.float32), change.B.astype(np.float32), 1.0),
                    joint.terms[0]._replace(weight=-1.0),
                ]
            )
            for (joint, _, _), change in zip(kept, changes, strict=True)
        ]
        tails = [energy_of(spectrum.S) for spectrum in spectra(missed)]
    return [
        (joint.site.path, Loss(tail + joint.loss.tail, energy_of(spectrum.S) + joint.loss.tail))
        for (joint, spectrum, _), tail in zip(kept, tails, strict=True)
    ]
