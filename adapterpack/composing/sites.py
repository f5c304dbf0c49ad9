"""Collects the sites that several packs change, with one term for each pack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..adapter_methods import Site, unfoldable
from ..adapter_methods.lora import lora
from ..base import Checkpoint
from ..errors import Unsupported
from ..io import Unread, one_thread_each
from ..lowrank import Cut, Loss, Term, Terms, zero
from ..pack import Adapter, Pack
from .as_factors import FactoredChange, represent
from .compatibility import SIDE_BY_SIDE, require_same_site
from .statistics import Statistics


class JointSite(NamedTuple):
    """A site that at least one pack changes: the site, its base tensor, and the terms in the order of the
    packs.

    ``ranks`` are the terms' ranks. ``loss`` is the weighted sum of the errors of approximating changes
    without a low rank by factors; 0 where all are exact. Terms that stay on disk are read at each use.
    """

    site: Site
    weight: str | None
    terms: Terms
    ranks: tuple[int, ...]
    loss: Loss = Loss(0.0, 0.0)

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``, the shape of the changes."""
        return self.site.out_features, self.site.in_features

    @property
    def numbers(self) -> int:
        """The number of entries of all factors together."""
        return sum(self.ranks) * sum(self.shape)


class SiteValues(NamedTuple):
    """The weight of each pack at a site, and the parameters of the rule that it has for itself there."""

    weights: Sequence[float]
    own: Sequence[Mapping[str, float]]


class _LazyTerms(Sequence[Term]):
    """A sequence of terms that reads each term from disk at each use."""

    def __init__(self, makers: Sequence[Callable[[], Term]]) -> None:
        self._makers = makers

    def __len__(self) -> int:
        return len(self._makers)

    def __getitem__(self, index: Any) -> Any:
        return self._makers[index]() if isinstance(index, int) else [make() for make in self._makers[index]]


def adapters_by_path(packs: Sequence[Pack]) -> dict[str, dict[int, Adapter]]:
    """Maps each path that a pack adapts to the adapters there by the index of their pack, in the order in
    which they first appear.
    """
    by_path: dict[str, dict[int, Adapter]] = {}
    for index, pack in enumerate(packs):
        for adapter in pack.adapters():
            by_path.setdefault(adapter.site.path, {})[index] = adapter
    return by_path


def gather(
    packs: Sequence[Pack],
    values: Callable[[str], SiteValues],
    *,
    base: Checkpoint | None = None,
    cut: Cut | None = None,
    statistics: Sequence[Statistics] | None = None,
) -> list[JointSite]:
    """Returns the union of the packs' sites, in the order in which they first appear.

    ``values`` gives the weights at a path. ``base`` serves methods whose change depends on the weight,
    ``cut`` limits the factors that approximate a change without a low rank, and ``statistics`` holds the
    measurements of each pack on data.

    Raises:
        Unsupported: a change that has no factors, or a site that two packs describe differently.
    """
    with one_thread_each():
        return [
            _joint_site(
                packs,
                [present.get(index) for index in range(len(packs))],
                values(path),
                base,
                cut,
                [None] * len(packs) if statistics is None else [measured.at(path) for measured in statistics],
            )
            for path, present in adapters_by_path(packs).items()
        ]


def _joint_site(
    packs: Sequence[Pack],
    adapters: Sequence[Adapter | None],
    values: SiteValues,
    base: Checkpoint | None,
    cut: Cut | None,
    measured: Sequence[np.ndarray | None],
) -> JointSite:
    present = [(pack, adapter) for pack, adapter in zip(packs, adapters, strict=True) if adapter is not None]
    first = present[0][0]
    site = present[0][1].site
    for pack, adapter in present:
        if adapter.method.kind == "weight" and site.kind not in lora.traits.layers:
            raise Unsupported(
                "a composed pack is a LoRA, which has no such kind of site",
                where=f"{site.path} in '{first.name}'",
                expected=" or ".join(lora.traits.layers),
                found=f"{site.kind}, by {adapter.method.name}",
                remedy=SIDE_BY_SIDE,
            )
        if reason := unfoldable(site.kind):
            raise Unsupported(
                reason, where=f"{site.path} in '{first.name}'", found=site.kind, remedy=SIDE_BY_SIDE
            )
        require_same_site((first.name, site), (pack.name, adapter.site))
    changes = [
        None if adapter is None or _on_disk(adapter) else represent(adapter, base=base, cut=cut)
        for adapter in adapters
    ]
    m, n = next(
        (change.shape for change in changes if change is not None), (site.out_features, site.in_features)
    )

    def term(index: int) -> Term:
        adapter = adapters[index]
        change = FactoredChange(*zero(m, n)) if adapter is None else changes[index] or represent(adapter)
        scale = float(getattr(adapter.config, "scale", 1.0)) if adapter is not None else 1.0
        return Term(
            change.A,
            change.up,
            values.weights[index],
            f"{packs[index].name}:{site.path}",
            scale,
            measured[index],
            change.factor,
            values.own[index],
        )

    makers = [partial(term, index) for index in range(len(packs))]
    terms: Terms = tuple(make() for make in makers) if any(changes) else _LazyTerms(makers)
    ranks = tuple(
        0 if adapter is None else adapter.config.rank if change is None else len(change.A)
        for adapter, change in zip(adapters, changes, strict=True)
    )
    losses = [
        (weight * weight, change.loss)
        for change, weight in zip(changes, values.weights, strict=True)
        if change is not None
    ]
    loss = Loss(
        sum(share * loss.tail for share, loss in losses), sum(share * loss.total for share, loss in losses)
    )
    biased = any(adapter.site.bias for _, adapter in present)
    weight_name = next((adapter.weight for _, adapter in present if adapter.weight is not None), None)
    if (site.bias, site.in_features, site.out_features) != (biased, n, m):
        site = dataclasses.replace(site, bias=biased, in_features=n, out_features=m)
    return JointSite(site, weight_name, terms, ranks, loss)


def _on_disk(adapter: Adapter) -> bool:
    """Whether an adapter stays on disk until it is used: its tensors are not in memory, and its factors are
    stored as they are.
    """
    method = adapter.method
    plain = method.traits.low_rank and method.traits.independent and "fold" not in method.overrides
    return plain and isinstance(adapter.params, Unread)
