"""Registers the kinds of adapters (weight, activation, attention, prompt): how each selects its sites and
which module holds it there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ..adapter_methods import Site, Traits
from ..errors import SiteNotFound
from ..registry import Registry
from .layers import (
    Adapted,
    AdaptedParameter,
    AdaptedTable,
    Targets,
    attention,
    encoder_decoder_prompts,
    innermost,
    module_at,
    prompts,
    select,
)
from .layers.block import AdaptedBlock
from .layers.block_targets import block_at, select_blocks
from .layers.conv import AdaptedConv, SpanningConv
from .layers.embedding import AdaptedEmbedding
from .layers.layer import AdaptedLayer
from .layers.norms import AdaptedNorm
from .layers.sites import holder_at, site_at

LAYERS: dict[str, type[Adapted]] = {
    "linear": AdaptedLayer,
    "transposed": AdaptedLayer,
    "embedding": AdaptedEmbedding,
    "table": AdaptedTable,
    "norm": AdaptedNorm,
    "conv": AdaptedConv,
    "grouped_conv": AdaptedConv,
    "spanning_conv": SpanningConv,
    "parameter": AdaptedParameter,
    "experts": AdaptedParameter,
    "turned_experts": AdaptedParameter,
}
"""Maps the kind of a site to the wrapper that holds weight adapters there."""


class Kind(NamedTuple):
    """How a model takes adapters of methods of the kind ``name``.

    ``select`` returns the sites that a config's targets name. ``at`` returns the module or parameter at a
    site's path. ``holder`` is the wrapper class for adapters of this kind, and ``wrap`` creates one from the
    model, the module, its path and the method's traits: around all wrappers that the module already has if
    ``outermost``, else inside them. ``ready`` completes a config with values that only the model knows.
    """

    name: str
    select: Callable[[nn.Module, Targets, Traits, tuple[str, ...]], list[Site]]
    holder: type[Adapted] | tuple[type[Adapted], ...]
    wrap: Callable[[nn.Module, nn.Module, str, Traits], Adapted]
    at: Callable[[nn.Module, str], nn.Module] = module_at
    ready: Callable[[nn.Module, Any], Any] = lambda model, config: config
    outermost: bool = False


def _layer(model: nn.Module, module: nn.Module, path: str, traits: Traits) -> Adapted:
    """Wraps a layer for weight adapters, by the kind of its site."""
    site = site_at(
        path, innermost(module), traits.layers, is_parameter=isinstance(module_at(model, path), nn.Parameter)
    )
    if site is None:
        raise SiteNotFound(
            "the module at this site cannot be adapted", where=path, found=type(innermost(module)).__name__
        )
    return LAYERS[site.kind](module, site)


KINDS: Registry[Kind] = Registry(
    "kind of adapter", Kind, "adapterpack.adapter_kinds", "adapterpack.torch_adapters.layers"
)
"""Maps the kind of a method to how a model takes its adapters."""

KINDS.register(Kind("weight", select, (AdaptedLayer, AdaptedParameter), _layer, holder_at))
KINDS.register(
    Kind(
        "activation",
        select_blocks,
        AdaptedBlock,
        lambda model, module, path, _: AdaptedBlock(module, block_at(model, path, module), model),
        outermost=True,
    )
)
KINDS.register(
    Kind(
        "attention",
        attention.select_attention,
        attention.AdaptedAttention,
        lambda model, module, path, _: attention.AdaptedAttention(module, attention.site_at(model, path)),
        ready=attention.last_layers,
        outermost=True,
    )
)
KINDS.register(
    Kind(
        "prompt",
        prompts.select,
        prompts.Prompts,
        lambda model, module, *_: encoder_decoder_prompts.around_embedding(model, module),
        prompts.embedding,
        prompts.ready,
    )
)
