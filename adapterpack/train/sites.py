"""Which modules of a model an adapter changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..errors import SiteNotFound, Unsupported, nearest
from ..methods import LAYOUTS, Site, Traits, matrix_shape
from .conv import CONVOLUTIONS, is_plain_convolution
from .embedding import is_plain_embedding
from .layer import innermost, module_at, own_modules


def _conv(path: str, module: Any) -> Site | None:
    if not is_plain_convolution(module):
        return None
    width = module.in_channels // module.groups * math.prod(module.kernel_size)
    kind = "conv" if module.groups == 1 else "grouped_conv"
    return Site(path, width, module.out_channels, kind, module.bias is not None, module.kernel_size)


def _embedding(path: str, module: Any) -> Site | None:
    return Site(path, module.num_embeddings, module.embedding_dim, "embedding") if is_plain_embedding(module) else None


LAYERS: dict[type[nn.Module] | str, Callable[[str, Any], Site | None]] = {
    nn.Linear: lambda path, module: Site(path, module.in_features, module.out_features, "linear", module.bias is not None),
    "transformers.pytorch_utils.Conv1D": lambda path, module: Site(path, module.nx, module.nf, "transposed", True),
    nn.Embedding: _embedding,
    **dict.fromkeys(CONVOLUTIONS, _conv),
}
"""Layer class -> the site that it is, or None where it does more than such a layer; a class of a library that need not be there by its
name. A class that is not here cannot be adapted but in its bare parameters."""


BYPASSED: tuple[type[nn.Module], ...] = (nn.modules.linear.NonDynamicallyQuantizableLinear,)
"""Classes whose owners read the weight and never call the layer (``nn.MultiheadAttention.out_proj``): an adapter there would do nothing,
so it goes to the owner, around the parameter."""

_NEVER_CALLED = (nn.ParameterList, nn.ParameterDict)


def _is(module: nn.Module, kind: type[nn.Module] | str) -> bool:
    if isinstance(kind, type):
        return isinstance(module, kind)
    return any(f"{each.__module__}.{each.__qualname__}" == kind for each in type(module).__mro__)


def _layer(path: str, module: nn.Module) -> Site | None:
    """The site of a layer, or None if its class is not in the table."""
    if isinstance(module, BYPASSED):
        return None
    return next((make(path, module) for kind, make in LAYERS.items() if _is(module, kind)), None)


def _parameters(path: str, module: nn.Module) -> Iterator[Site]:
    """The parameters that a module, no layer of the table, owns and multiplies by: matrices, and stacks of them.

    A stack is ``[n, out, in]``, or ``[n, in, out]`` where the module says that it ``is_transposed``, as fused experts do.
    """
    if isinstance(module, (*BYPASSED, *_NEVER_CALLED)):
        return
    stack = "turned_experts" if getattr(module, "is_transposed", False) else "experts"
    called = [(leaf, value) for leaf, value in module.named_parameters(recurse=False)]
    for leaf, child in module.named_children():
        if isinstance(child, BYPASSED):
            called += [(f"{leaf}.{name}", value) for name, value in child.named_parameters()]
    for leaf, value in called:
        kind = {2: "parameter", 3: stack}.get(value.ndim)
        shape = None if kind is None else matrix_shape(kind, value.shape)
        if kind is not None and shape is not None:
            out, width = shape
            yield Site(f"{path}.{leaf}".lstrip("."), width, out, kind, stack=value.shape[0] if value.ndim == 3 else 1)


def sites_of(path: str, module: nn.Module) -> list[Site]:
    """The sites that a module of the model is: the layer, or for attention its projections; none for what has to be named closer."""
    if isinstance(module, nn.MultiheadAttention):
        return list(_parameters(path, module))
    site = _layer(path, module)
    return [] if site is None else [site]


def site_at(path: str, module: nn.Module) -> Site | None:
    """The site of that path, which is the module's or that of a parameter in it; None where there is none."""
    layer = _layer(path, module)
    if layer is not None:
        return layer
    parts = path.split(".")
    owners = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    return next((site for owner in owners for site in _parameters(owner, module) if site.path == path), None)


def known_sites(model: nn.Module) -> dict[str, list[Site]]:
    """Every path that may be named in a model, modules and bare parameters, and the sites that it stands for."""
    known: dict[str, list[Site]] = {}
    for path, module in own_modules(model):
        if path:
            known[path] = sites_of(path, module)
        if _layer(path, module) is None:
            known |= {site.path: [site] for site in _parameters(path, module)}
    return known


def holder_at(model: nn.Module, path: str) -> nn.Module:
    """What stands at a path of the model; for a parameter's, at the module that is called with it.

    Raises:
        AttributeError: there is no such path.
    """
    found = module_at(model, path)
    while path and (not isinstance(found, nn.Module) or isinstance(innermost(found), BYPASSED)):
        path = path.rpartition(".")[0]
        found = module_at(model, path)
    return found


def select(model: nn.Module, targets: str | tuple[str, ...], traits: Traits, exclude: tuple[str, ...] = ()) -> list[Site]:
    """The sites that ``targets`` names, in the model's order.

    ``targets`` is ``"all-linear"`` (every linear layer except the output embedding and the modules at or below the paths ``exclude``) or
    names: a literal module path or the end of one, matched whole components at a time; never a pattern. A parameter that no layer owns is
    named by its own path, and attention stands for its projections.

    Raises:
        SiteNotFound: a name matches nothing; the nearest module name is given.
        Unsupported: a named module is of a kind that the method does not support, or is among ``exclude``.
    """
    if _layer("", model) is not None:
        raise Unsupported("the model is itself a layer, which cannot be replaced inside it", found=type(model).__name__,
                          remedy="put it into a container, such as nn.Sequential")
    modules = {path: module for path, module in own_modules(model) if path}
    known = known_sites(model)
    skipped = {path for path in known if any(path == name or path.startswith(f"{name}.") for name in exclude)}
    if targets == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        heads = {own for _, own in own_modules(head)} if head is not None else set()
        sites = [site for path, module in modules.items() if path not in skipped and module not in heads
                 for site in known[path] if LAYOUTS[site.kind].linear and site.kind in traits.layers]
        if not sites:
            raise SiteNotFound("the model has no linear layer that the method supports", expected=", ".join(traits.layers))
        return sites
    names = (targets,) if isinstance(targets, str) else targets
    chosen: dict[str, Site] = {}
    for name in names:
        matches = [path for path in known if path == name or path.endswith(f".{name}")]
        if not matches:
            leaves = {path.rpartition(".")[2] for path, sites in known.items() if sites}
            raise SiteNotFound("the model has no such site", found=repr(name), remedy=nearest(name, leaves))
        for path in matches:
            sites = known[path]
            if not sites or any(site.kind not in traits.layers for site in sites):
                raise Unsupported("the method does not support this layer", where=path, expected=", ".join(traits.layers),
                                  found=type(modules[path]).__name__ if path in modules else sites[0].kind, remedy="name other targets")
            if path in skipped:
                raise Unsupported("a module can be adapted or trained whole, not both", where=path,
                                  remedy="take it out of targets or out of modules_to_save")
            chosen |= {site.path: site for site in sites}
    order = list(dict.fromkeys(site.path for sites in known.values() for site in sites))
    return [chosen[path] for path in order if path in chosen]
