"""Combines several packs into one: exactly where the rule allows it, and with the loss in the lineage where a
rank is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapter_methods.nodes.composed import NAME as COMPOSED
from ..errors import ConfigError
from ..io import Progress, refuse_existing
from ..pack import Pack, as_pack
from ..paths import StrPath
from .arguments import BySite, checked_weights, chosen_name
from .assemble import TreeLike, assemble
from .recipe import CompositionRecipe, repeat
from .statistics import Statistics
from .steps import CompositionRequest, Score, compose_by_rule

Packs = Sequence[Pack | StrPath]


def compose(
    packs: Packs,
    *,
    rule: str = "linear",
    weights: Sequence[float] | None = None,
    params: Mapping[str, Any] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    budget: float | None = None,
    whole: str = "average",
    by_site: BySite | None = None,
    statistics: Sequence[Statistics | StrPath] | None = None,
    score: Score | None = None,
    base: StrPath | None = None,
    name: str | None = None,
    out: StrPath | None = None,
    tree: TreeLike | None = None,
    seed: int = 0,
    recipe: CompositionRecipe | StrPath | None = None,
    progress: Progress | None = None,
) -> Pack:
    """Combines packs by a rule into one LoRA pack; or, with a tree, into a pack that holds them all and
    combines them at run time.

    Packs of (IA)^3 alone, under a rule that is a weighted sum of changes and without rank, energy or budget,
    give one of (IA)^3, exactly.

    Args:
        packs: the packs, or their folders; all of one base and one task. A pack that does not change a site
            adds nothing there. Their order only assigns the weights: any order gives the same tensors to the
            bit.
        rule: how the changes are combined; ``linear`` is the weighted sum of the changes ``s_i B_i A_i``.
        weights: one number a pack, of any sign; by default equal, of sum 1 or, for rules of sums such as
            ``task_arithmetic``, 1 each.
        params: the rule's own parameters.
        rank: keeps at most this rank at every site, by the best approximation of the combined change. A rule
            whose result has no low rank, such as ``ties``, takes the largest rank of the packs if neither
            rank, energy nor budget is given, and warns of what that loses.
        energy: keeps at every site the smallest rank that holds this share (0 to 1) of the squared singular
            values.
        budget: the numbers that all factors together may have, or below 1 that share of those of all packs.
            Ranks are shared out over all sites so that the total error is least; a site that gets none is
            left out, and listed.
        whole: how to combine fully trained modules, such as heads: ``average``; ``union``, which puts heads
            of different labels side by side as one head of all labels; or ``pick:NAME``, those of one pack.
        by_site: weights that differ from site to site, and parameters that differ from pack to pack there:
            ``{"model.layers.0.self_attn.q_proj": {"weight": [0.7, 0.3], "density": [1.0, 0.5]}}``, in the
            order of the packs. A site that is not named takes ``weights`` and ``params``.
        statistics: for rules that look at data, what :func:`adapterpack.measure` wrote of each pack, in their
            order.
        score: for ``lorahub``, how good a pack is: the weights are searched for that make the best.
        base: the checkpoint of the base model, for methods whose change depends on the weight (DoRA, OFT,
            ...); others need none.
        name: the new pack's name; the name of ``out``, or of the rule and the packs, by default.
        out: a new folder to write the pack to.
        tree: instead of a rule, how the packs work together, by their names: ``"sum(0.7*a, stack(b, c))"``,
            ``"arrow(a, b, c, top_k=2)"``, the same as JSON values, or nodes of
            :mod:`~adapterpack.adapter_methods.nodes`. ``docs/methods.md`` lists the kinds of nodes.
        seed: the seed for the initial values of trainable nodes and for a rule's random choices.
        recipe: instead of all these, a recipe (:mod:`adapterpack.composing.recipe`), or a composed pack:
            rebuilds that pack, byte for byte, from the same packs. Digests identify the packs, so they may
            come in any order.
        progress: called with (bytes of factors combined, bytes in all) while a rule works; in a search, for
            the result alone.

    Returns:
        The pack: float32, ``alpha = r`` at every site, so the scale is 1. With ``rank``, ``energy`` or
            ``budget`` its
        ``manifest.lineage.params`` hold ``truncation``: the relative Frobenius error at every site, and of
            all sites together; and where a
        change has no low rank ``approximation``, the error of taking it as factors before.

    Raises:
        NothingToDo: there are no packs, or the combined change is zero everywhere.
        ConfigError: wrong weights, parameters, rank, energy, budget or name; a rule that needs statistics or
            a score has none.
        UnknownName: there is no such rule.
        BaseMismatch: the packs belong to different bases.
        Unsupported: the packs cannot be combined exactly; the message says why and what to do.
        FormatError: what the packs say of their ancestors cannot be true together, or a recipe is of other
            packs.

    Example:
        >>> compose(["packs/tickets", "packs/emails"], weights=[0.7, 0.3],
        ...     out="packs/both").name  # doctest: +SKIP
        'both'
    """
    refuse_existing(out)
    other_options = (rule, whole) != ("linear", "average") or any(
        option is not None for option in (weights, params, rank, energy, budget, by_site, score)
    )
    if recipe is not None:
        if other_options or tree is not None or seed:
            raise ConfigError(
                "a recipe says itself how the packs are combined",
                where="recipe",
                expected="the packs, and where they go",
                remedy="leave the other options out, or the recipe",
            )
        pack = repeat(
            recipe,
            [as_pack(pack) for pack in packs],
            base=base,
            statistics=statistics,
            name=name or (None if out is None else Path(out).name),
            progress=progress,
        )
        return pack if out is None else pack.write(out)
    if tree is not None and (other_options or statistics is not None):
        raise ConfigError(
            "a tree says itself how the packs are combined",
            where="tree",
            expected="no rule, weights, parameters, rank, energy or budget",
            remedy="write weights into the tree: sum(0.7*a, 0.3*b)",
        )
    request = CompositionRequest(rule, weights, params or {}, rank, energy, budget, whole, by_site)
    request = request.with_seed(seed)
    checked_weights(packs, weights)
    parents = [as_pack(pack) for pack in packs]
    called = chosen_name(name, out, rule if tree is None else COMPOSED, parents)
    if tree is None:
        pack = compose_by_rule(parents, request, called, base, statistics, score, progress)
    else:
        pack = assemble(parents, tree, called, seed)
    return pack if out is None else pack.write(out)
