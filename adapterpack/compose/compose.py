"""Several packs combined into one, exactly where the rule allows it, and with the loss written down where a rank is asked for."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, NonFinite, NothingToDo, Unsupported
from ..methods.composed import NAME as COMPOSED
from ..methods.lora import LoRA, lora
from ..pack.atomic import refuse_existing
from ..pack.lineage import descended
from ..pack.pack import Pack, build
from ..pack.validate import load
from . import rules
from .agree import common_base, common_task
from .assemble import TreeLike, assemble
from .sites import Place, gather
from .space import Factors, Loss, recompress
from .whole import average

MAX_PARENTS = 64
"""As many parents as a manifest can name."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def compose(
    packs: Sequence[Pack | str | os.PathLike[str]],
    *,
    rule: str = "linear",
    weights: Sequence[float] | None = None,
    params: Mapping[str, Any] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    name: str | None = None,
    out: str | os.PathLike[str] | None = None,
    tree: TreeLike | None = None,
    seed: int = 0,
) -> Pack:
    """One LoRA pack whose change is that of several packs, combined by a rule (:func:`adapterpack.rules`); or, with a tree, one pack that
    holds them all and combines them when it runs.

    Args:
        packs: the packs, or their folders; all of one base and one task. A pack that does not change a site adds nothing there.
        rule: how the changes are combined; ``linear`` is the weighted sum of the changes ``s_i B_i A_i``.
        weights: one number a pack, of any sign; equal and of sum 1 by default.
        params: the rule's own parameters.
        rank: keeps this rank at every site, by the best approximation of the combined change.
        energy: keeps at every site the smallest rank that holds this share (0 to 1) of the squared singular values.
        name: the new pack's name; the name of ``out``, or of the rule and the packs, by default.
        out: a new folder to write the pack to.
        tree: instead of a rule, how the packs work together, by their names: ``"sum(0.7*a, stack(b, c))"``, ``"arrow(a, b, c, top_k=2)"``,
            the same as JSON values, or nodes of :mod:`adapterpack.methods.nodes`. The kinds of nodes are listed in ``docs/methods.md``.
        seed: of what a node that is trained begins with.

    Returns:
        The pack: float32, ``alpha = r`` at every site, so the scale is 1. With ``rank`` or ``energy`` its ``manifest.lineage.params`` hold
        ``truncation``: the relative Frobenius error at every site, and of all sites together. Modules that were trained whole are averaged.

    Raises:
        NothingToDo: there are no packs, or the combined change is zero everywhere.
        ConfigError: wrong weights, parameters, rank, energy or name.
        UnknownName: there is no such rule.
        BaseMismatch: the packs belong to different bases.
        Unsupported: the packs cannot be combined exactly; the message says why and what to do.
        FormatError: what the packs say of their ancestors cannot be true together.

    Example:
        >>> compose(["packs/tickets", "packs/emails"], weights=[0.7, 0.3], out="packs/both").name  # doctest: +SKIP
        'both'
    """
    if tree is not None:
        _refuse_rule(rule, weights, params, rank, energy)
        return _assembled(packs, tree, name, out, seed)
    chosen = rules.get(rule)
    arguments = chosen.arguments(params)
    _check_cut(rank, energy)
    factors = _weights(packs, weights)
    if out is not None:
        refuse_existing(Path(out))
    parents = [pack if isinstance(pack, Pack) else load(pack) for pack in packs]
    chosen_name = _name(name, out, rule, parents)
    base, task = common_base(parents), common_task(parents)
    full = average(parents, factors)
    places = gather(parents, factors)

    cut = rank is not None or energy is not None
    changes: list[Factors] = []
    losses: dict[str, Loss] = {}
    for place in places:
        with np.errstate(over="ignore"):  # told below, with the place
            change: Factors = chosen.function(place.terms, **arguments)
        if not (np.isfinite(change.A).all() and np.isfinite(change.B).all()):
            raise NonFinite("the combined change is too large for float32", where=place.site.path, remedy="choose smaller weights")
        if cut or chosen.reduce:
            A, B, losses[place.site.path] = recompress(change.A, change.B, rank=rank, energy=energy)
            change = Factors(A, B)
        changes.append(change)
    if not full and not any(np.any(change.A) and np.any(change.B) for change in changes):
        raise NothingToDo("the combined change is zero at every site", where=", ".join(parent.name for parent in parents),
                          found=f"weights {', '.join(f'{weight:g}' for weight in factors)}",
                          remedy="choose weights under which something is left")

    details = {**arguments, **{key: value for key, value in (("rank", rank), ("energy", energy)) if value is not None}}
    lineage = descended(rule, parents, {**details, "truncation": _truncation(losses)} if cut else details, factors)
    licenses = {parent.manifest.license for parent in parents}
    composed = build(
        chosen_name,
        lora,
        {place.site: _as_lora(change) for place, change in zip(places, changes, strict=True)},
        task=task,
        base=base,
        full=full,
        weights=_base_tensors(places, parents),
        lineage=lineage,
        license=licenses.pop() if len(licenses) == 1 else None,
    )
    return composed if out is None else composed.write(out)


def _refuse_rule(rule: str, *others: Any) -> None:
    if rule != "linear" or any(other is not None for other in others):
        raise ConfigError("a tree says itself how the packs are combined", where="tree",
                          expected="no rule, weights, parameters, rank or energy",
                          remedy="write weights into the tree: sum(0.7*a, 0.3*b)")


def _assembled(
    packs: Sequence[Pack | str | os.PathLike[str]], tree: TreeLike, name: str | None, out: str | os.PathLike[str] | None, seed: int
) -> Pack:
    if out is not None:
        refuse_existing(Path(out))
    parents = [pack if isinstance(pack, Pack) else load(pack) for pack in packs]
    _weights(parents, None)
    pack = assemble(parents, tree, _name(name, out, COMPOSED, parents), seed)
    return pack if out is None else pack.write(out)


def _as_lora(change: Factors) -> tuple[LoRA, dict[str, np.ndarray]]:
    size = change.A.shape[0]
    params = {"lora_A": np.ascontiguousarray(change.A, np.float32), "lora_B": np.ascontiguousarray(change.B, np.float32)}
    return LoRA(r=size, alpha=float(size)), params


def _base_tensors(places: Sequence[Place], parents: Sequence[Pack]) -> dict[str, str | None]:
    whole = {group.path: group.weight for parent in parents for group in parent.manifest.groups if group.role == "full" and group.weight}
    return {**whole, **{place.site.path: place.weight for place in places}}


def _truncation(losses: Mapping[str, Loss]) -> dict[str, Any]:
    pooled = Loss(sum(loss.tail for loss in losses.values()), sum(loss.total for loss in losses.values()))
    return {"total": pooled.relative, "sites": {path: loss.relative for path, loss in losses.items()}}


def _weights(packs: Sequence[Any], weights: Sequence[float] | None) -> list[float]:
    if not packs:
        raise NothingToDo("there are no packs to compose", remedy="name at least one pack")
    if len(packs) > MAX_PARENTS:
        raise Unsupported("too many packs for one composition", expected=f"at most {MAX_PARENTS}", found=len(packs),
                          remedy="compose in two steps")
    if weights is None:
        return [1 / len(packs)] * len(packs)
    if len(weights) != len(packs):
        raise ConfigError("every pack needs one weight", where="weights", expected=len(packs), found=len(weights),
                          remedy="give as many weights as packs, in the same order")
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError("a weight is not a finite number", where="weights", found=", ".join(map(str, weights)),
                          remedy="give finite numbers")
    return [float(weight) for weight in weights]


def _check_cut(rank: int | None, energy: float | None) -> None:
    if rank is not None and energy is not None:
        raise ConfigError("rank and energy both say where to cut", expected="one of them", found=f"rank={rank}, energy={energy}",
                          remedy="give one of them")
    if rank is not None and rank < 1:
        raise ConfigError("a rank must be a positive whole number", where="rank", expected="at least 1", found=rank,
                          remedy="give a larger rank")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError("an energy is a share of the squared singular values", where="energy", expected="above 0, at most 1",
                          found=energy, remedy="give a share such as 0.99")


def _name(name: str | None, out: str | os.PathLike[str] | None, rule: str, parents: Sequence[Pack]) -> str:
    chosen = name or (Path(out).name if out is not None else "-".join([rule, *(parent.name for parent in parents)])[:128])
    if not _NAME.fullmatch(chosen):
        raise ConfigError("a pack's name holds letters, digits, dots, dashes and underscores only", where="name",
                          expected="at most 128 of them, beginning with a letter or a digit", found=repr(chosen),
                          remedy="give another name")
    return chosen
