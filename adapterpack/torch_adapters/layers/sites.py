"""Selects the modules and parameters of a model that weight adapters change.

A :class:`Site` describes such a place to a method: its path, kind and widths. A class counts as a layer of a
kind only if it computes what the kind stands for; subclasses that compute something else are refused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from ...adapter_methods import LAYOUTS, Site, Traits, matrix_shape, unfoldable
from ...errors import SiteNotFound, Unsupported, nearest
from .weights import format_of, is_plain
from .wrapper import (
    Targets,
    as_list,
    base_modules,
    innermost,
    is_inside,
    is_named,
    module_at,
    paths_of,
)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_plain_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution that uses its weight unchanged; some subclasses normalise it, or pad
    in their own way.
    """
    return isinstance(module, CONVOLUTIONS) and any(
        type(module).forward is kind.forward for kind in CONVOLUTIONS
    )


def is_plain_embedding(module: nn.Embedding) -> bool:
    """Whether a module only looks up its weight, at most scaled by ``embed_scale``, and never modifies the
    weight (``max_norm``).
    """
    plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    return plain and module.max_norm is None


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises its input and scales it by a vector. Norms have no base class in common.

    Such a module has "norm" in its class name, no child modules or buffers (running statistics), and as
    parameters a vector ``weight`` and possibly a ``bias`` of its shape.
    """
    parameters = dict(module.named_parameters())
    return (
        "norm" in type(module).__name__.lower()
        and not [*module.children(), *module.buffers()]
        and {"weight"} <= parameters.keys() <= {"weight", "bias"}
        and parameters["weight"].ndim == 1
        and len({value.shape for value in parameters.values()}) == 1
    )


def _linear(path: str, module: Any) -> Site | None:
    """Returns the site of a linear layer."""
    if not is_plain_linear(module):
        return None
    return Site(path, module.in_features, module.out_features, "linear", module.bias is not None)


def is_plain_linear(module: nn.Linear) -> bool:
    """Whether a linear layer's input and output have its declared widths.

    Some subclasses differ: grouped products, or routers that return several tensors. A subclass with a
    forward of its own is run on the meta device, without data. Layers with quantized weights count as plain.
    """
    weight = module._parameters.get("weight")
    quantized = weight is None or not is_plain(weight) or format_of(module) is not None
    if quantized or type(module).forward is nn.Linear.forward:
        return True
    values = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    try:
        empty = {name: torch.empty_like(value, device="meta") for name, value in values.items()}
        x = torch.empty(1, 3, module.in_features, dtype=module.weight.dtype, device="meta")
        with torch.no_grad():
            y = functional_call(module, empty, x)
    except NotImplementedError:
        # An operation needs data, so the layer cannot be tried; assume that it is plain.
        return True
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    return isinstance(y, torch.Tensor) and y.shape == (1, 3, module.out_features)


def _conv(path: str, module: Any) -> Site | None:
    """Returns the site of a convolution; its input width includes the kernel."""
    if not is_plain_convolution(module):
        return None
    width = module.in_channels // module.groups * math.prod(module.kernel_size)
    kind = "conv" if module.groups == 1 else "grouped_conv"
    return Site(path, width, module.out_channels, kind, module.bias is not None, module.kernel_size)


def _spanning(path: str, module: Any) -> Site | None:
    """Returns the site of a grouped convolution whose adapter reads the inputs of all groups."""
    site = _conv(path, module)
    if site is None or site.kind != "grouped_conv":
        return None
    return replace(
        site, kind="spanning_conv", in_features=site.in_features * module.groups, stack=module.groups
    )


def _embedding(path: str, module: Any) -> Site | None:
    """Returns the site of an embedding as a linear layer of one-hot inputs."""
    return (
        Site(path, module.num_embeddings, module.embedding_dim, "embedding")
        if is_plain_embedding(module)
        else None
    )


def _table(path: str, module: Any) -> Site | None:
    """Returns the site of an embedding for methods that change its rows."""
    return (
        Site(path, module.embedding_dim, module.num_embeddings, "table")
        if is_plain_embedding(module)
        else None
    )


def _norm(path: str, module: Any) -> Site | None:
    """Returns the site of a normalisation layer."""
    if not is_norm(module):
        return None
    parameters = dict(module.named_parameters())
    return Site(path, 1, len(parameters["weight"]), "norm", "bias" in parameters)


Maker = Callable[[str, Any], Site | None]
LAYERS: dict[type[nn.Module] | str, tuple[Maker, ...]] = {
    nn.Linear: (_linear,),
    "transformers.pytorch_utils.Conv1D": (
        lambda path, module: Site(path, module.nx, module.nf, "transposed", True),
    ),
    nn.Embedding: (_embedding, _table),
    **dict.fromkeys(CONVOLUTIONS, (_conv, _spanning)),
}
"""Maps layer classes to functions that return the sites such a layer can be, or None if it computes something
else.

Classes of libraries that may not be installed are listed by name. A method takes the first site of a kind
that it supports. Norms have no common class (:func:`is_norm`); of all other classes only bare
parameters can be adapted.
"""


BYPASSED: tuple[type[nn.Module], ...] = (nn.modules.linear.NonDynamicallyQuantizableLinear,)
"""Classes whose owners read the weight and never call the layer (``nn.MultiheadAttention.out_proj``). A
wrapper there would have no effect, so the owner is wrapped instead, and the parameter is adapted.
"""

_NEVER_CALLED = (nn.ParameterList, nn.ParameterDict)


def _layer(path: str, module: nn.Module, layers: Sequence[str] = ()) -> Site | None:
    """Returns the site of a layer, of one of the kinds ``layers`` if possible; None if it is not a layer that
    can be adapted.
    """
    if isinstance(module, BYPASSED):
        return None
    classes = type(module).__mro__
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in classes}
    makers = [makers for kind, makers in LAYERS.items() if kind in classes or kind in names]
    sites = [site for make in (makers[0] if makers else (_norm,)) if (site := make(path, module)) is not None]
    return next((site for site in sites if site.kind in layers), sites[0] if sites else None)


def _parameters(path: str, module: nn.Module) -> Iterator[Site]:
    """Yields the sites of bare parameters that a module owns and multiplies by: matrices, and stacks of them.

    A stack is ``[n, out, in]``, or ``[n, in, out]`` if the module declares ``is_transposed``, as fused
    experts do.
    """
    if isinstance(module, (*BYPASSED, *_NEVER_CALLED)):
        return
    stack = "turned_experts" if getattr(module, "is_transposed", False) else "experts"
    called = list(module.named_parameters(recurse=False))
    for leaf, child in module.named_children():
        if isinstance(child, BYPASSED):
            called += [(f"{leaf}.{name}", value) for name, value in child.named_parameters()]
    for leaf, value in called:
        kind = {2: "parameter", 3: stack}.get(value.ndim)
        shape = None if kind is None else matrix_shape(kind, value.shape)
        if kind is not None and shape is not None:
            out, width = shape
            yield Site(
                f"{path}.{leaf}".lstrip("."), width, out, kind, stack=value.shape[0] if value.ndim == 3 else 1
            )


_LINEAR = tuple(kind for kind, layout in LAYOUTS.items() if layout.linear)
_STACKED = ("experts", "turned_experts")
_EXPERTS = "experts"
_ROUTERS = ("gate", "router")
"""The name of the module that holds experts, and the names of the routers that choose among them."""


class Every(NamedTuple):
    """What a word in ``targets`` selects: the sites of these kinds whose paths begin with one of the prefixes
    that ``inside`` returns.
    """

    kinds: tuple[str, ...]
    inside: Callable[[nn.Module], tuple[str, ...]] = lambda model: ("",)


def experts_in(model: nn.Module) -> tuple[str, ...]:
    """Returns the path prefixes of experts, which their name or their class name identifies; their inputs are
    tokens in an order of the router's.
    """
    return tuple(
        f"{path}."
        for path, module in base_modules(model)
        if path.rpartition(".")[2] == _EXPERTS or _EXPERTS in type(module).__name__.lower()
    )


def language_part(model: nn.Module) -> tuple[str, ...]:
    """Returns the path prefix of the language model in a model that has other parts, such as a vision
    tower.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    path = next((path for path, module in base_modules(model) if module is innermost(decoder)), "")
    whole = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return ("",) if whole or not path else (f"{path}.",)


ALL = {
    "all-linear": Every(_LINEAR),
    "all-norm": Every(("norm",)),
    "all-experts": Every((*_STACKED, *_LINEAR), experts_in),
    "all-language": Every(_LINEAR, language_part),
}
"""The words that ``targets`` accepts for all layers of a kind."""


def site_at(
    path: str, module: nn.Module, layers: Sequence[str] = (), is_parameter: bool = False
) -> Site | None:
    """Returns the site at a path: the module's, or a parameter's if ``is_parameter`` or if the module is not
    a layer; None if there is none.
    """
    layer = None if is_parameter else _layer(path, module, layers)
    if layer is not None:
        return layer
    parts = path.split(".")
    owners = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    return next((site for owner in owners for site in _parameters(owner, module) if site.path == path), None)


def targetable_sites(model: nn.Module, layers: Sequence[str] = ()) -> dict[str, list[Site]]:
    """Returns every path that targets can name in a model, modules and bare parameters, with its sites; of
    the kinds ``layers`` where possible.
    """
    sites = {}
    for path, module in base_modules(model):
        site = _layer(path, module, layers)
        parameters = [] if site is not None else list(_parameters(path, module))
        if path:
            sites[path] = (
                [site]
                if site is not None
                else parameters
                if isinstance(module, nn.MultiheadAttention)
                else []
            )
        sites |= {parameter.path: [parameter] for parameter in parameters}
    return sites


def attachable_sites(model: nn.Module) -> dict[str, list[Site]]:
    """Returns the paths of :func:`targetable_sites` and, as PEFT adapts these too, the weight matrices of
    layers under their parameters' own paths.
    """
    layers = {
        site.path: [site]
        for path, module in base_modules(model)
        if path and _layer(path, module) is not None
        for site in _parameters(path, module)
    }
    return {**layers, **targetable_sites(model)}


def holder_at(model: nn.Module, path: str) -> nn.Module:
    """Returns the module at a path; for a parameter, the module that is called with it.

    Raises:
        AttributeError: the model has no such path.
    """
    holder = module_at(model, path)
    while path and (not isinstance(holder, nn.Module) or isinstance(innermost(holder), BYPASSED)):
        path = path.rpartition(".")[0]
        holder = module_at(model, path)
    return holder


def _wide_enough(site: Site, traits: Traits) -> bool:
    """Whether a site has at least the widths that the method needs."""
    return site.out_features >= traits.min_features[0] and site.in_features >= traits.min_features[1]


def _input_embedding(model: nn.Module) -> str:
    """Returns the path of the model's input embedding."""
    try:
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:
        # Models of several parts do not declare one.
        embedding = None
    found_path = next(iter(paths_of(model, embedding)), None)
    if found_path is None:
        raise SiteNotFound(
            "the model does not say which its input embedding is",
            where=type(model).__name__,
            remedy="name the embedding in targets",
        )
    return found_path


def _aside(model: nn.Module, paths: Iterable[str]) -> set[str]:
    """Returns the paths that words for all layers skip: those of the output embedding and of routers."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    owners = {path.rpartition(".")[0] for path in paths if path.rpartition(".")[2] == _EXPERTS}
    routers = tuple(f"{owner}.{name}".lstrip(".") for owner in owners for name in _ROUTERS)
    return {*paths_of(model, head), *(path for path in paths if is_inside(path, routers))}


def left_out(model: nn.Module, sites: Iterable[Site]) -> Counter[str]:
    """Counts the matrices of a model that are not among these sites, by the last two names of their paths;
    norms and embeddings are not counted.
    """
    taken = {site.path for site in sites}
    left = Counter[str]()
    for path, kinds in targetable_sites(model).items():
        if any(
            site.path not in taken and site.kind in {*_LINEAR, *_STACKED, "parameter"} for site in kinds[:1]
        ):
            left[".".join(path.split(".")[-2:])] += 1
    return left


def select(model: nn.Module, targets: Targets, traits: Traits, exclude: tuple[str, ...] = ()) -> list[Site]:
    """Returns the sites that ``targets`` names, in the model's order.

    ``targets`` is ``"input-embedding"``, one word or name, or several. The words are ``"all-linear"``,
    ``"all-norm"``, ``"all-experts"`` and, for the language model alone, ``"all-language"``: every layer of
    that kind except the output embedding, routers, and modules at or below the paths ``exclude``. A name is a
    module's path or the end of it, compared by whole components; never a pattern. A parameter that no layer
    owns has its own path as its name, and an attention module stands for its projections.

    Raises:
        SiteNotFound: a name matches nothing; the error suggests the nearest module name.
        Unsupported: a named module is of a kind that the method does not support, or is among ``exclude``.
    """
    if _layer("", model) is not None:
        raise Unsupported(
            "the model is itself a layer, which cannot be replaced inside it",
            found=type(model).__name__,
            remedy="put it into a container, such as nn.Sequential",
        )
    modules = {path: module for path, module in base_modules(model) if path}
    traits = replace(traits, layers=tuple(kind for kind in traits.layers if not unfoldable(kind)))
    sites_by_path = targetable_sites(model, traits.layers)
    skipped = {path for path in sites_by_path if is_inside(path, exclude)}
    chosen: dict[str, Site] = {}
    for name in [_input_embedding(model)] if targets == "input-embedding" else as_list(targets):
        if name in ALL:
            aside = skipped | _aside(model, sites_by_path)
            inside = ALL[name].inside(model)
            every = {
                site.path: site
                for path, sites in sites_by_path.items()
                if path not in aside and path.startswith(inside)
                for site in sites
                if site.kind in ALL[name].kinds and site.kind in traits.layers and _wide_enough(site, traits)
            }
            if not every:
                raise SiteNotFound(
                    "the model has no such layer that the method supports",
                    where=name,
                    expected=", ".join(traits.layers),
                )
            chosen |= every
            continue
        matches = [path for path in sites_by_path if is_named(path, [name])]
        if not matches:
            leaves = {path.rpartition(".")[2] for path, sites in sites_by_path.items() if sites}
            raise SiteNotFound("the model has no such site", found=repr(name), remedy=nearest(name, leaves))
        for path in matches:
            sites = sites_by_path[path]
            # A word skips layers that the method does not support; a name that matches one is an error.
            if not sites or any(site.kind not in traits.layers for site in sites):
                raise Unsupported(
                    "the method does not support this layer",
                    where=path,
                    expected=", ".join(traits.layers),
                    found=type(modules[path]).__name__ if path in modules else sites[0].kind,
                    remedy="name other targets",
                )
            if not all(_wide_enough(site, traits) for site in sites):
                raise Unsupported(
                    "the layer is too narrow: the method would change nothing there",
                    where=path,
                    remedy="name other targets",
                    expected="at least {} outputs and {} inputs".format(*traits.min_features),
                    found=" and ".join(f"{site.out_features} x {site.in_features}" for site in sites),
                )
            if path in skipped:
                raise Unsupported(
                    "a module can be adapted or trained whole, not both",
                    where=path,
                    remedy="take it out of targets or out of modules_to_save",
                )
            chosen |= {site.path: site for site in sites}
    # In the model's order, whatever the order of targets: it decides the order of random initialisation.
    order = list(dict.fromkeys(site.path for sites in sites_by_path.values() for site in sites))
    return [chosen[path] for path in order if path in chosen]
