"""Several packs combined into one, exactly where the rule allows it, and with the loss written down where a rank is asked for."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, NonFinite, NothingToDo, Unsupported
from ..methods.lora import LoRA, lora
from ..pack.atomic import refuse_existing
from ..pack.checkpoint import Checkpoint
from ..pack.lineage import descended
from ..pack.pack import Pack, build
from ..pack.validate import load
from ..threads import in_order, one_thread_each
from . import rules
from .agree import common_base, common_task
from .cut import Cut
from .finish import finished, finite
from .sites import Place, gather
from .space import Factors
from .spectra import Loss
from .whole import average

if TYPE_CHECKING:
    from .assemble import TreeLike

MAX_PARENTS = 64
"""As many parents as a manifest can name."""
_BATCH = 16 << 20
"""Numbers of factors that are combined at a time: 64 MB in float32."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def compose(
    packs: Sequence[Pack | str | os.PathLike[str]],
    *,
    rule: str = "linear",
    weights: Sequence[float] | None = None,
    params: Mapping[str, Any] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    base: str | os.PathLike[str] | None = None,
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
        weights: one number a pack, of any sign; by default equal, of sum 1 or, for rules of sums such as ``task_arithmetic``, 1 each.
        params: the rule's own parameters.
        rank: keeps at most this rank at every site, by the best approximation of the combined change.
        energy: keeps at every site the smallest rank that holds this share (0 to 1) of the squared singular values.
        base: the checkpoint behind the packs, for methods whose change depends on the weight (DoRA, OFT, ...); others need none.
        name: the new pack's name; the name of ``out``, or of the rule and the packs, by default.
        out: a new folder to write the pack to.
        tree: instead of a rule, how the packs work together, by their names: ``"sum(0.7*a, stack(b, c))"``, ``"arrow(a, b, c, top_k=2)"``,
            the same as JSON values, or nodes of :mod:`adapterpack.methods.nodes`. The kinds of nodes are listed in ``docs/methods.md``.
        seed: of what a node that is trained begins with, and of a rule's random choices.

    Returns:
        The pack: float32, ``alpha = r`` at every site, so the scale is 1. With ``rank`` or ``energy`` its ``manifest.lineage.params`` hold
        ``truncation``: the relative Frobenius error at every site, and of all sites together; and where a change has no low rank
        ``approximation``, the error of taking it as factors before. Modules that were trained whole are averaged.

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
    arguments = chosen.arguments({"seed": seed, **(params or {})} if "seed" in chosen.parameters else params)
    cut = Cut(rank, energy)
    if chosen.cut and not cut.asked:
        raise ConfigError("the result of this rule has no low rank of its own", where=f"rule {rule}", expected="a rank or an energy",
                          remedy="give the rank that the new pack may have, such as rank=16, or the share of the energy that it must hold")
    factors = checked_weights(packs, weights, unit=chosen.unit)
    if out is not None:
        refuse_existing(Path(out))
    parents = [pack if isinstance(pack, Pack) else load(pack) for pack in packs]
    called = chosen_name(name, out, rule, parents)
    origin, task = common_base(parents), common_task(parents)
    full = average(parents, factors)
    places = gather(parents, factors, base=opened_base(base, parents), cut=_finer(cut))

    changes: list[Factors] = []
    losses: dict[str, Loss] = {}
    with one_thread_each(), np.errstate(over="ignore", invalid="ignore"):  # told below, with the place
        combine = chosen.prepared([place.terms for place in places], arguments)
        for batch in _batches(places):
            made = list(in_order(lambda place: combine(place.terms), batch))
            for place, change in zip(batch, made, strict=True):
                if isinstance(change, Factors):
                    _require_finite(change, place)
            for place, (change, loss) in zip(batch, finished(made, cut, chosen.reduce), strict=True):
                _require_finite(change, place)
                changes.append(change)
                if loss is not None:
                    losses[place.site.path] = loss
    if not full and not any(np.any(change.A) and np.any(change.B) for change in changes):
        raise NothingToDo("the combined change is zero at every site", where=", ".join(parent.name for parent in parents),
                          found=f"weights {', '.join(f'{weight:g}' for weight in factors)}",
                          remedy="choose weights under which something is left")

    details: dict[str, Any] = {**arguments, **cut.asked}
    if cut.asked:
        details["truncation"] = truncation(losses)
    if approximated := {place.site.path: place.loss for place in places if place.loss.tail}:
        details["approximation"] = truncation(approximated)
    lineage = descended(rule, parents, details, factors)
    licenses = {parent.manifest.license for parent in parents}
    composed = build(
        called,
        lora,
        {place.site: as_lora(change) for place, change in zip(places, changes, strict=True)},
        task=task,
        base=origin,
        full=full,
        weights=base_tensors(places, parents),
        lineage=lineage,
        license=licenses.pop() if len(licenses) == 1 else None,
    )
    return composed if out is None else composed.write(out)


def _batches(places: Sequence[Place]) -> Iterator[list[Place]]:
    """The places in lists of about :data:`_BATCH` numbers, so that the copies that a rule makes are of few sites at a time."""
    batch: list[Place] = []
    numbers = 0
    for place in places:
        batch.append(place)
        numbers += sum(term.A.size + term.B.size for term in place.terms)
        if numbers >= _BATCH:
            yield batch
            batch, numbers = [], 0
    if batch:
        yield batch


def _require_finite(change: Factors, place: Place) -> None:
    if not finite(change):
        raise NonFinite("the combined change is too large for float32", where=place.site.path, remedy="choose smaller weights")


def _refuse_rule(rule: str, *others: Any) -> None:
    if rule != "linear" or any(other is not None for other in others):
        raise ConfigError("a tree says itself how the packs are combined", where="tree",
                          expected="no rule, weights, parameters, rank or energy",
                          remedy="write weights into the tree: sum(0.7*a, 0.3*b)")


def _assembled(
    packs: Sequence[Pack | str | os.PathLike[str]], tree: TreeLike, name: str | None, out: str | os.PathLike[str] | None, seed: int
) -> Pack:
    from ..methods.composed import NAME  # noqa: PLC0415 - the rules do without it
    from .assemble import assemble  # noqa: PLC0415 - as above

    if out is not None:
        refuse_existing(Path(out))
    parents = [pack if isinstance(pack, Pack) else load(pack) for pack in packs]
    checked_weights(parents, None)
    pack = assemble(parents, tree, chosen_name(name, out, NAME, parents), seed)
    return pack if out is None else pack.write(out)


def _finer(cut: Cut) -> Cut:
    """How changes without a low rank are approximated before they are combined: finer than the result, so that it is what is cut last."""
    return Cut(None if cut.rank is None else 2 * cut.rank, None if cut.energy is None else 1 - (1 - cut.energy) / 4)


def opened_base(base: str | os.PathLike[str] | None, packs: Sequence[Pack]) -> Checkpoint | None:
    """The checkpoint, shown to be the base of all packs by names, shapes and samples.

    Raises:
        BaseMismatch, SiteNotFound: a pack was made for another base.
    """
    if base is None:
        return None
    checkpoint = Checkpoint(base)
    for pack in packs:
        pack.require_base(checkpoint, content=False)
    return checkpoint


def as_lora(change: Factors, dtype: Any = np.float32) -> tuple[LoRA, dict[str, np.ndarray]]:
    """A change as a LoRA of its rank and of scale 1, and at least of rank 1."""
    m, n = change.shape
    A, B = change if change.rank else (np.zeros((1, n)), np.zeros((m, 1)))
    return LoRA(r=len(A), alpha=float(len(A))), {"lora_A": np.ascontiguousarray(A, dtype), "lora_B": np.ascontiguousarray(B, dtype)}


def base_tensors(places: Sequence[Place], parents: Sequence[Pack]) -> dict[str, str | None]:
    """The base tensor behind every path of the result."""
    whole = {group.path: group.weight for parent in parents for group in parent.manifest.groups if group.role == "full" and group.weight}
    return {**whole, **{place.site.path: place.weight for place in places}}


def truncation(losses: Mapping[str, Loss]) -> dict[str, Any]:
    """The relative errors of all sites together and of each, as a manifest has them."""
    pooled = Loss(sum(loss.tail for loss in losses.values()), sum(loss.total for loss in losses.values()))
    return {"total": pooled.relative, "sites": {path: loss.relative for path, loss in losses.items()}}


def checked_weights(packs: Sequence[Any], weights: Sequence[float] | None, unit: bool = False) -> list[float]:
    """One finite weight a pack; by default equal and of sum 1, or 1 each (``unit``).

    Raises:
        NothingToDo, Unsupported: no packs, or too many.
        ConfigError: as many weights as packs are wanted, all finite.
    """
    if not packs:
        raise NothingToDo("there are no packs to compose", remedy="name at least one pack")
    if len(packs) > MAX_PARENTS:
        raise Unsupported("too many packs for one composition", expected=f"at most {MAX_PARENTS}", found=len(packs),
                          remedy="compose in two steps")
    if weights is None:
        return [1.0 if unit else 1 / len(packs)] * len(packs)
    if len(weights) != len(packs):
        raise ConfigError("every pack needs one weight", where="weights", expected=len(packs), found=len(weights),
                          remedy="give as many weights as packs, in the same order")
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError("a weight is not a finite number", where="weights", found=", ".join(map(str, weights)),
                          remedy="give finite numbers")
    return [float(weight) for weight in weights]


def chosen_name(name: str | None, out: str | os.PathLike[str] | None, rule: str, parents: Sequence[Pack]) -> str:
    """The name that was given, or that of the folder, or one of the rule and the packs.

    Raises:
        ConfigError: a pack cannot be called that.
    """
    chosen = name or (Path(out).name if out is not None else "-".join([rule, *(parent.name for parent in parents)])[:128])
    if not _NAME.fullmatch(chosen):
        raise ConfigError("a pack's name holds letters, digits, dots, dashes and underscores only", where="name",
                          expected="at most 128 of them, beginning with a letter or a digit", found=repr(chosen),
                          remedy="give another name")
    return chosen
