"""The kinds of adapter, as far as a model is concerned: where each goes, and what holds it there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from ..errors import SiteNotFound
from ..methods import Site, Traits
from .embeddings import AdaptedEmbedding
from .layer import Adapted, AdaptedLayer
from .norms import AdaptedNorm
from .sites import select, site_at

LAYERS: dict[str, type[AdaptedLayer]] = {"embedding": AdaptedEmbedding, "norm": AdaptedNorm}
"""Kind of a site -> its wrapper for weight methods, where it is not the common one."""


class Kind(NamedTuple):
    """``select`` finds the sites that a config's targets name; ``wrap`` makes the wrapper for one of them, around the module there."""

    select: Callable[[nn.Module, str | tuple[str, ...], Traits, tuple[str, ...]], list[Site]]
    wrap: Callable[[nn.Module, str], Adapted]


def _layer(module: nn.Module, path: str) -> AdaptedLayer:
    site = site_at(path, module)
    if site is None:
        raise SiteNotFound("the module at this site cannot be adapted", where=path, found=type(module).__name__)
    return LAYERS.get(site.kind, AdaptedLayer)(module, site)


KINDS: dict[str, Kind] = {"weight": Kind(select, _layer)}
"""Kind of a method -> how a model takes it."""
