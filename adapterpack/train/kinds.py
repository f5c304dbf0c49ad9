"""The kinds of adapter, as far as a model is concerned: where each goes, and what holds it there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from ..errors import SiteNotFound
from ..methods import Site, Traits
from .conv import AdaptedConv
from .embedding import AdaptedEmbedding
from .layer import Adapted, AdaptedLayer, innermost
from .parameter import AdaptedParameter
from .sites import select, site_at

LAYERS: dict[str, type[Adapted]] = {
    "linear": AdaptedLayer,
    "transposed": AdaptedLayer,
    "embedding": AdaptedEmbedding,
    "conv": AdaptedConv,
    "grouped_conv": AdaptedConv,
    "parameter": AdaptedParameter,
    "experts": AdaptedParameter,
    "turned_experts": AdaptedParameter,
}
"""Kind of a site -> what holds the adapters of weight methods there."""


class Kind(NamedTuple):
    """``select`` finds the sites that a config's targets name; ``wrap`` makes the wrapper for one of them, around the module there."""

    select: Callable[[nn.Module, str | tuple[str, ...], Traits, tuple[str, ...]], list[Site]]
    wrap: Callable[[nn.Module, str], Adapted]


def _layer(module: nn.Module, path: str) -> Adapted:
    site = site_at(path, innermost(module))
    if site is None:
        raise SiteNotFound("the module at this site cannot be adapted", where=path, found=type(innermost(module)).__name__)
    return LAYERS[site.kind](module, site)


KINDS: dict[str, Kind] = {"weight": Kind(select, _layer)}
"""Kind of a method -> how a model takes it."""
