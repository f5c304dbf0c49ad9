"""A pack of another rank: the best approximation of its change, site by site or under one budget for all."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..adapter_methods.lora import lora
from ..errors import ConfigError, NothingToDo
from ..io.atomic import refuse_existing
from ..io.safetensors import FLOATS, dtype_name
from ..io.threads import one_thread_each
from ..lowrank.space import Factors, Term, stack, summed
from ..lowrank.spectra import Loss, Spectrum, spectra
from ..lowrank.truncation import Cut, energy_of, shared_out
from ..pack.lineage import descended
from ..pack.pack import Pack, build
from ..pack.validate.validation import load
from .arguments import chosen_name, opened_base
from .result import as_lora, base_tensors, truncation
from .sites import Place, gather

_FULL_RANK = 256
"""The rank up to which a change without a low rank takes part in a budget."""


def resize(
    pack: Pack | str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    sv_ratio: float | None = None,
    sv_cumulative: float | None = None,
    sv_fro: float | None = None,
    budget: float | None = None,
    base: str | os.PathLike[str] | None = None,
    name: str | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Pack:
    """One pack as a LoRA of smaller rank: at every site the best approximation of the change, by its exact singular values.

    Args:
        pack: a pack or its folder. Any method whose change can be held by factors; what has no low rank is approximated, and says so.
        rank: the most that any site keeps, beside any of the criteria.
        energy: the fewest singular values S that hold this share of sum S^2; the relative error is then at most sqrt(1 - energy).
        sv_ratio: the values above S_1 / sv_ratio.
        sv_cumulative: the fewest values that hold this share of sum S.
        sv_fro: the fewest values that hold this share of sqrt(sum S^2). These three are named as in kohya's resize script.
        budget: the numbers that all factors together may have, or if it is below 1 that share of what they are now. Ranks are shared out
            over all sites so that the total error is least; a site that gets none is left out of the pack, and listed.
        base: the checkpoint behind the pack, for methods whose change depends on the weight (DoRA, OFT, ...).
        name: the new pack's name; by default that of ``out``, or the old one with ``-resized``.
        out: a new folder to write the pack to.

    Returns:
        The pack, of scale 1, its tensors in the dtype that they had. ``manifest.lineage.params`` hold what was asked for and
        ``truncation``: the relative Frobenius error of the stored change at each site and in total; ``left_out`` and ``approximation``
        where there is something to list. Modules that were trained whole stay as they are.

    Raises:
        ConfigError: nothing was asked for, or something that cannot be.
        NothingToDo: the change is zero, or the budget holds no rank at all.
        Unsupported: a change that no factors hold; the message says which and why.

    Example:
        >>> resize("packs/tickets", energy=0.99, out="packs/small").manifest.lineage.params["truncation"]["total"]  # doctest: +SKIP
        0.083
    """
    cut = Cut(rank, energy, sv_ratio, sv_cumulative, sv_fro)
    _check(cut, budget)
    if out is not None:
        refuse_existing(Path(out))
    parent = pack if isinstance(pack, Pack) else load(pack)
    called = chosen_name(name or (None if out is not None else f"{parent.name[:120]}-resized"), out, "resize", [parent])
    with one_thread_each():
        checkpoint, on_base = opened_base(base, [parent])
        places = gather(on_base, [1.0], base=checkpoint, cut=_approximating(cut))
        found = spectra([summed(place.terms) for place in places])
    if not places or not any(len(each.S) for each in found):
        raise NothingToDo("the change is zero at every site", where=f"pack '{parent.name}'", remedy="resize a pack that changes something")
    ranks = _ranks(parent, places, found, cut, budget)
    dtype = _dtype(parent)
    kept = [(place, each, rank) for place, each, rank in zip(places, found, ranks, strict=True) if rank]
    changes = [_stored(each.cut(rank)[0], dtype) for _, each, rank in kept]
    losses = dict(_losses(kept, changes, dtype))
    left_out = [place.site.path for place, rank in zip(places, ranks, strict=True) if not rank]
    for place, each in zip(places, found, strict=True):
        if place.site.path in left_out:
            losses[place.site.path] = Loss(energy_of(each.S) + place.loss.tail, energy_of(each.S) + place.loss.tail)
    details: dict[str, Any] = {**cut.asked, **({} if budget is None else {"budget": budget}), "truncation": truncation(losses)}
    if left_out:
        details["left_out"] = left_out
    if approximated := {place.site.path: place.loss for place in places if place.loss.tail}:
        details["approximation"] = truncation(approximated)
    manifest = parent.manifest
    made = build(
        called,
        lora,
        {place.site: as_lora(change, dtype) for (place, _, _), change in zip(kept, changes, strict=True)},
        task=manifest.task,
        base=manifest.base,
        full=parent.full(),
        weights=base_tensors([place for place, _, _ in kept], [parent]),
        lineage=descended("resize", [parent], details),
        license=manifest.license,
    )
    made = dataclasses.replace(made, extra={})
    return made if out is None else made.write(out)


def _check(cut: Cut, budget: float | None) -> None:
    if not cut.asked and budget is None:
        raise ConfigError("nothing says how small the pack should become", where="resize",
                          expected="rank, energy, sv_ratio, sv_cumulative, sv_fro or budget", remedy="give one, such as energy 0.99")
    if budget is not None and cut.criteria:
        raise ConfigError(f"budget and {next(iter(cut.criteria))} both say where to cut", where="budget", expected="one of them",
                          remedy="give one of them")
    if budget is not None and not (np.isfinite(budget) and budget > 0):
        raise ConfigError("a budget is a number of parameters, or below 1 a share of today's", where="budget", expected="above 0",
                          found=budget, remedy="give a number such as 500000, or 0.5")


def _approximating(cut: Cut) -> Cut:
    """How a change without a low rank is taken as factors before it is cut: by more than what is kept."""
    return cut if cut.asked else Cut(_FULL_RANK)


def _ranks(parent: Pack, places: Sequence[Place], found: Sequence[Spectrum], cut: Cut, budget: float | None) -> list[int]:
    """What every site keeps; without a budget at least 1, since a pack should change the sites that it changed."""
    if budget is None:
        return [max(1, cut.kept(each.S, energy_of(each.S) + place.loss.tail)) for place, each in zip(places, found, strict=True)]
    costs = [sum(place.shape) for place in places]
    now = sum(value.size for place in places for value in parent.params(place.site.path).values())
    numbers = int(budget * now) if budget < 1 else int(budget)
    ranks = shared_out([each.S for each in found], costs, numbers, cut.rank)
    if not any(ranks):
        raise NothingToDo("the budget does not hold one rank at one site", where="budget", expected=f"at least {min(costs)} numbers",
                          found=numbers, remedy="give a larger budget")
    return ranks


def _dtype(pack: Pack) -> np.dtype[Any]:
    """The dtype that all of the adapters' floating tensors have, or float32 where they differ or are integers."""
    groups = {group.path for group in pack.manifest.groups if group.role == "adapter"}
    names = {entry.dtype for entry in pack.manifest.tensors.values() if entry.group in groups}
    found = {value.dtype for path in sorted(groups)[:1] for value in pack.params(path).values()}
    return found.pop() if len(names) == 1 and len(found) == 1 and names <= FLOATS and pack.manifest.quantization is None else np.dtype("f4")


def _stored(change: Factors, dtype: np.dtype[Any]) -> Factors:
    return Factors(change.A.astype(dtype), change.B.astype(dtype))


def _losses(
    kept: Sequence[tuple[Place, Spectrum, int]], changes: Sequence[Factors], dtype: np.dtype[Any]
) -> list[tuple[str, Loss]]:
    """What is lost at every site: the singular values beyond the cut, or where the dtype is narrow, all that the stored factors miss."""
    if dtype_name(dtype) in {"F32", "F64"}:
        tails = [energy_of(each.S[rank:]) for _, each, rank in kept]
    else:
        missed = [stack([Term(change.A.astype(np.float32), change.B.astype(np.float32), 1.0), place.terms[0]._replace(weight=-1.0)])
                  for (place, _, _), change in zip(kept, changes, strict=True)]
        tails = [energy_of(each.S) for each in spectra(missed)]
    return [(place.site.path, Loss(tail + place.loss.tail, energy_of(each.S) + place.loss.tail))
            for (place, each, _), tail in zip(kept, tails, strict=True)]
