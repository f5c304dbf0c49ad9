"""The sites that packs change, brought together: at every site one term a pack."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import Unsupported
from ..methods import Method, Site, complete, is_stacked
from ..methods.lora import lora
from ..pack.pack import Adapter, Pack
from .agree import SIDE_BY_SIDE
from .space import Term


class Place(NamedTuple):
    """One site of the union: the site, the base tensor behind it, and the terms in the order of the packs."""

    site: Site
    weight: str | None
    terms: tuple[Term, ...]


def gather(packs: Sequence[Pack], weights: Sequence[float]) -> list[Place]:
    """The union of the packs' sites, in the order in which they first appear.

    Raises:
        Unsupported: a method whose changes do not add up in factor space, or a site that two packs describe differently.
    """
    found: dict[str, list[Adapter | None]] = {}
    for index, pack in enumerate(packs):
        _require_sum(pack)
        for adapter in pack.adapters():
            found.setdefault(adapter.site.path, [None] * len(packs))[index] = adapter
    return [_place(packs, adapters, weights) for adapters in found.values()]


def _require_sum(pack: Pack) -> None:
    traits = pack.method.traits
    needed = {"additive": traits.additive, "low-rank": traits.low_rank, "independent of the base weight": not traits.reads_weight,
              "the same at every position": not traits.positional}
    if missing := [what for what, has in needed.items() if not has]:
        raise Unsupported(f"changes of the method {pack.method.name} cannot be combined by their factors", where=f"pack '{pack.name}'",
                          expected=f"a change that is {', '.join(needed)}", found=f"not {', not '.join(missing)}",
                          remedy="merge this pack into the base, or serve the packs side by side in a bank bundle"
                          if pack.method.kind == "weight" and not traits.positional else SIDE_BY_SIDE)


def _place(packs: Sequence[Pack], adapters: Sequence[Adapter | None], weights: Sequence[float]) -> Place:
    present = [(pack, adapter) for pack, adapter in zip(packs, adapters, strict=True) if adapter is not None]
    first, site = present[0][0], present[0][1].site
    for pack, adapter in present[1:]:
        if _shape(adapter.site) != _shape(site):
            raise Unsupported("two packs describe a site differently", where=f"{site.path} in '{first.name}' and '{pack.name}'",
                              expected=_shape(site), found=_shape(adapter.site), remedy="compose packs that were trained on one base")
    if site.kind not in lora.traits.layers:
        raise Unsupported("a composed pack is a LoRA, which has no such kind of site", where=f"{site.path} in '{first.name}'",
                          expected=" or ".join(lora.traits.layers), found=site.kind, remedy=SIDE_BY_SIDE)
    if is_stacked(site.kind):
        raise Unsupported("the matrices of a stack are not composed", where=f"{site.path} in '{first.name}'", found=site.kind,
                          remedy=SIDE_BY_SIDE)
    terms = tuple(_term(pack.method, adapter, site, weight) for pack, adapter, weight in zip(packs, adapters, weights, strict=True))
    biased = any(adapter.site.bias for _, adapter in present)
    named = next((adapter.weight for _, adapter in present if adapter.weight is not None), None)
    return Place(dataclasses.replace(site, bias=biased), named, terms)


def _shape(site: Site) -> str:
    return f"{site.kind} [{site.out_features}, {site.in_features}]" + (f" with kernel {site.kernel}" if site.kernel else "")


def _term(method: Method, adapter: Adapter | None, site: Site, weight: float) -> Term:
    if adapter is None:
        return Term(np.zeros((0, site.in_features), np.float32), np.zeros((site.out_features, 0), np.float32), weight)
    form = method.attach(adapter.config, complete(method, adapter.config, adapter.wide, site), site)
    if form.down is None or form.up is None or not form.is_branch:
        raise Unsupported(f"the method {method.name} does more at this site than add up @ down", where=site.path, remedy=SIDE_BY_SIDE)
    return Term(np.asarray(form.down.dense()), np.asarray(form.up.dense()), weight)
