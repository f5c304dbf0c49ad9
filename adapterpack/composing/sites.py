"""The sites that packs change, brought together: at every site one term a pack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..adapter_methods import Site
from ..adapter_methods.lora import lora
from ..errors import Unsupported
from ..io.streamed_tensors import Unread
from ..io.threads import one_thread_each
from ..lowrank.space import Term, zero
from ..lowrank.spectra import Loss
from ..lowrank.truncation import Cut
from ..pack.pack import Adapter, Pack
from .compatibility import SIDE_BY_SIDE
from .represent import Represented, represent

if TYPE_CHECKING:
    from ..base.checkpoint import Checkpoint
    from .statistics import Statistics


class Place(NamedTuple):
    """One site of the union: the site, the base tensor behind it, and the terms in the order of the packs.

    ``ranks`` are the terms' ranks. ``loss`` is what the factors of the terms leave out of the changes that have no low rank, weighted and
    added up; nothing where all are exact. The terms of packs that are too large to hold are read each time that they are looked at.
    """

    site: Site
    weight: str | None
    terms: Sequence[Term]
    ranks: tuple[int, ...]
    loss: Loss = Loss(0.0, 0.0)

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``, the shape of the changes."""
        return self.site.out_features, self.site.in_features

    @property
    def numbers(self) -> int:
        """The numbers of all factors together."""
        return sum(self.ranks) * sum(self.shape)


class _Terms(Sequence[Term]):
    """Terms that are made when they are looked at."""

    def __init__(self, makers: Sequence[Callable[[], Term]]) -> None:
        self._makers = makers

    def __len__(self) -> int:
        return len(self._makers)

    def __getitem__(self, index: Any) -> Any:
        return self._makers[index]() if isinstance(index, int) else [make() for make in self._makers[index]]


def gather(
    packs: Sequence[Pack], weights: Sequence[float], *, base: Checkpoint | None = None, cut: Cut | None = None,
    statistics: Sequence[Statistics] | None = None,
) -> list[Place]:
    """The union of the packs' sites, in the order in which they first appear.

    ``base`` is for methods whose change depends on the weight that it changes, ``cut`` for changes that factors only approximate,
    ``statistics`` what was measured of each pack.

    Raises:
        Unsupported: a change that has no factors, or a site that two packs describe differently.
    """
    found: dict[str, list[Adapter | None]] = {}
    for index, pack in enumerate(packs):
        for adapter in pack.adapters():
            found.setdefault(adapter.site.path, [None] * len(packs))[index] = adapter
    known: Sequence[Statistics | None] = statistics or [None] * len(packs)
    with one_thread_each():
        return [_place(packs, adapters, weights, base, cut, [None if one is None else one.at(path) for one in known])
                for path, adapters in found.items()]


def _place(
    packs: Sequence[Pack], adapters: Sequence[Adapter | None], weights: Sequence[float], base: Checkpoint | None, cut: Cut | None,
    measured: Sequence[np.ndarray | None],
) -> Place:
    present = [(pack, adapter) for pack, adapter in zip(packs, adapters, strict=True) if adapter is not None]
    first, site = present[0][0], present[0][1].site
    for pack, adapter in present:
        if adapter.method.kind == "weight" and site.kind not in lora.traits.layers:
            raise Unsupported("a composed pack is a LoRA, which has no such kind of site", where=f"{site.path} in '{first.name}'",
                              expected=" or ".join(lora.traits.layers), found=f"{site.kind}, by {adapter.method.name}", remedy=SIDE_BY_SIDE)
        if _form(adapter.site) != _form(site):
            raise Unsupported("two packs describe a site differently", where=f"{site.path} in '{first.name}' and '{pack.name}'",
                              expected=_shape(site), found=_shape(adapter.site), remedy="compose packs that were trained on one base")
    made = [None if adapter is None or _later(adapter) else represent(adapter, base=base, cut=cut) for adapter in adapters]
    m, n = next((each.shape for each in made if each is not None), (site.out_features, site.in_features))

    def term(index: int) -> Term:
        pack, adapter, each = packs[index], adapters[index], made[index]
        found = Represented(*zero(m, n)) if adapter is None else each or represent(adapter)
        return Term(found.A, found.up, weights[index], f"{pack.name}:{site.path}", _scale(adapter), measured[index], found.factor)

    makers = [partial(term, index) for index in range(len(packs))]
    terms: Sequence[Term] = tuple(make() for make in makers) if any(made) else _Terms(makers)
    ranks = tuple(0 if adapter is None else adapter.config.rank if each is None else len(each.A)
                  for adapter, each in zip(adapters, made, strict=True))
    losses = [(weight * weight, each.loss) for each, weight in zip(made, weights, strict=True) if each is not None]
    loss = Loss(sum(share * each.tail for share, each in losses), sum(share * each.total for share, each in losses))
    biased = any(adapter.site.bias for _, adapter in present)
    named = next((adapter.weight for _, adapter in present if adapter.weight is not None), None)
    if (site.bias, site.in_features, site.out_features) != (biased, n, m):
        site = dataclasses.replace(site, bias=biased, in_features=n, out_features=m)
    return Place(site, named, terms, ranks, loss)


def _later(adapter: Adapter) -> bool:
    """Whether an adapter is read when it is looked at: its tensors are not in memory, and its factors are what it stores."""
    method = adapter.method
    plain = method.traits.low_rank and method.traits.additive and not method.traits.reads_weight and method.fold is None
    return plain and isinstance(adapter.params, Unread)


def _scale(adapter: Adapter | None) -> float:
    """The scale of the adapter's branch; 1 where its method has none."""
    return 1.0 if adapter is None else float(getattr(adapter.config, "scale", 1.0))


def _form(site: Site) -> tuple[object, ...]:
    return site.kind, site.out_features, site.in_features, site.kernel


def _shape(site: Site) -> str:
    return f"{site.kind} [{site.out_features}, {site.in_features}]" + (f" with kernel {site.kernel}" if site.kernel else "")
