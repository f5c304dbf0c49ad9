"""The kinds of adapter, as far as a model is concerned: where each goes, and what holds it there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ..errors import SiteNotFound
from ..methods import Site, Traits
from . import prompts
from .block import AdaptedBlock
from .embeddings import AdaptedEmbedding
from .layer import Adapted, AdaptedLayer, module_at
from .norms import AdaptedNorm
from .places import block_at, select_blocks
from .sites import select, site_at

LAYERS: dict[str, type[AdaptedLayer]] = {"embedding": AdaptedEmbedding, "norm": AdaptedNorm}
"""Kind of a site -> its wrapper for weight methods, where it is not the common one."""


class Kind(NamedTuple):
    """``select`` finds the sites that a config's targets name; ``at`` gives what stands in the model at a site's path.

    ``holder`` is the class that holds adapters of the kind. ``wrap`` makes one, from the model, the module there, and the path; around what
    already wraps the module if it is ``outermost``, else inside of that. ``ready`` completes a config by what only the model knows.
    """

    select: Callable[[nn.Module, str | tuple[str, ...], Traits, tuple[str, ...]], list[Site]]
    holder: type[Adapted]
    wrap: Callable[[nn.Module, nn.Module, str], Adapted]
    at: Callable[[nn.Module, str], nn.Module] = module_at
    ready: Callable[[nn.Module, Any], Any] = lambda model, config: config
    outermost: bool = False


def _layer(model: nn.Module, module: nn.Module, path: str) -> AdaptedLayer:
    site = site_at(path, module)
    if site is None:
        raise SiteNotFound("the module at this site cannot be adapted", where=path, found=type(module).__name__)
    return LAYERS.get(site.kind, AdaptedLayer)(module, site)


def _block(model: nn.Module, module: nn.Module, path: str) -> AdaptedBlock:
    return AdaptedBlock(module, block_at(model, path, module), model)


KINDS: dict[str, Kind] = {
    "weight": Kind(select, AdaptedLayer, _layer),
    "activation": Kind(select_blocks, AdaptedBlock, _block, outermost=True),
    "prompt": Kind(prompts.select, prompts.Prompts, prompts.around_embedding, prompts.embedding, prompts.ready),
}
"""Kind of a method -> how a model takes it."""
