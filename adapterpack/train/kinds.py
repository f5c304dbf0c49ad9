"""The kinds of adapter, as far as a model is concerned: where each goes, and what holds it there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from ..errors import SiteNotFound
from ..methods import Site, Traits
from .block import AdaptedBlock
from .layer import Adapted, AdaptedLayer
from .places import block_at, select_blocks
from .sites import select, site_at


class Kind(NamedTuple):
    """``select`` finds the sites that a config's targets name. ``holder`` is the class that holds adapters of the kind.

    ``wrap`` makes one, from the model, the module there, and the path; around what already wraps the module if it is ``outermost``, else
    inside of that.
    """

    select: Callable[[nn.Module, str | tuple[str, ...], Traits, tuple[str, ...]], list[Site]]
    holder: type[Adapted]
    wrap: Callable[[nn.Module, nn.Module, str], Adapted]
    outermost: bool = False


def _layer(model: nn.Module, module: nn.Module, path: str) -> AdaptedLayer:
    site = site_at(path, module)
    if site is None:
        raise SiteNotFound("the module at this site cannot be adapted", where=path, found=type(module).__name__)
    return AdaptedLayer(module, site)


def _block(model: nn.Module, module: nn.Module, path: str) -> AdaptedBlock:
    return AdaptedBlock(module, block_at(model, path, module), model)


KINDS: dict[str, Kind] = {
    "weight": Kind(select, AdaptedLayer, _layer),
    "activation": Kind(select_blocks, AdaptedBlock, _block, outermost=True),
}
"""Kind of a method -> how a model takes it."""
