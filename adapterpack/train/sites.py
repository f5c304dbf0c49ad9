"""Which modules of a model an adapter changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import SiteNotFound, Unsupported, nearest
from ..methods import Site, Traits
from .layer import own_modules
from .norms import is_norm

LAYERS: dict[type[nn.Module], Callable[[str, Any], Site]] = {
    nn.Linear: lambda path, module: Site(path, module.in_features, module.out_features, "linear", module.bias is not None),
    nn.Embedding: lambda path, module: Site(path, module.embedding_dim, module.num_embeddings, "embedding"),
}
"""Layer class -> the site that it is. Norms have no class in common (:func:`~.norms.is_norm`); what is neither cannot be adapted."""


BYPASSED: tuple[type[nn.Module], ...] = (nn.modules.linear.NonDynamicallyQuantizableLinear,)
"""Classes whose owners read the weight and never call the layer (``nn.MultiheadAttention.out_proj``): an adapter there would do nothing."""


ALL = {"all-linear": "linear", "all-norm": "norm"}
"""What ``targets`` may say for every layer of a kind."""


def site_at(path: str, module: nn.Module) -> Site | None:
    """The site of a module, or None if its class is not in the table."""
    if isinstance(module, BYPASSED):
        return None
    found = next((make(path, module) for kind, make in LAYERS.items() if isinstance(module, kind)), None)
    if found is None and is_norm(module):
        parameters = dict(module.named_parameters())
        return Site(path, 1, len(parameters["weight"]), "norm", "bias" in parameters)
    return found


def _wide_enough(site: Site, traits: Traits) -> bool:
    return site.out_features >= traits.least[0] and site.in_features >= traits.least[1]


def _input_embedding(model: nn.Module) -> str:
    """The path of the model's input embedding."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    own = {module for _, module in own_modules(embedding)} if embedding is not None else set()
    found = next((path for path, module in own_modules(model) if module in own), None)
    if found is None:
        raise SiteNotFound("the model does not say which its input embedding is", where=type(model).__name__,
                           remedy="name the embedding in targets")
    return found


def select(model: nn.Module, targets: str | tuple[str, ...], traits: Traits, exclude: tuple[str, ...] = ()) -> list[Site]:
    """The sites that ``targets`` names, in the model's order.

    ``targets`` is ``"all-linear"`` or ``"all-norm"`` (every layer of that kind except the output embedding and the modules at or below the
    paths ``exclude``), ``"input-embedding"``, or names: a literal module path or the end of one, matched whole components at a time; never
    a pattern.

    Raises:
        SiteNotFound: a name matches nothing; the nearest module name is given.
        Unsupported: a named module is of a kind that the method does not support, or is among ``exclude``.
    """
    modules = dict(own_modules(model))
    if site_at("", modules.pop("")) is not None:
        raise Unsupported("the model is itself a layer, which cannot be replaced inside it", found=type(model).__name__,
                          remedy="put it into a container, such as nn.Sequential")
    skipped = {path for path in modules if any(path == name or path.startswith(f"{name}.") for name in exclude)}
    if isinstance(targets, str) and targets in ALL:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        heads = {own for _, own in own_modules(head)} if head is not None else set()
        sites = [site for path, module in modules.items() if path not in skipped and module not in heads
                 if (site := site_at(path, module)) is not None and site.kind in traits.layers and site.kind == ALL[targets]
                 and _wide_enough(site, traits)]
        if not sites:
            raise SiteNotFound("the model has no layer that the method supports", expected=", ".join(traits.layers))
        return sites
    names = (targets,) if isinstance(targets, str) else targets
    if targets == "input-embedding":
        names = (_input_embedding(model),)
    chosen: dict[str, Site] = {}
    for name in names:
        matches = [path for path in modules if path == name or path.endswith(f".{name}")]
        if not matches:
            leaves = {path.rpartition(".")[2] for path, module in modules.items() if site_at(path, module)}
            raise SiteNotFound("the model has no such site", found=repr(name), remedy=nearest(name, leaves))
        for path in matches:
            site = site_at(path, modules[path])
            if site is None or site.kind not in traits.layers:
                raise Unsupported("the method does not support this layer", where=path, expected=", ".join(traits.layers),
                                  found=type(modules[path]).__name__, remedy="name other targets")
            if not _wide_enough(site, traits):
                raise Unsupported("the layer is too narrow: the method would change nothing there", where=path, remedy="name other targets",
                                  expected="at least {} outputs and {} inputs".format(*traits.least),
                                  found=f"{site.out_features} and {site.in_features}")
            if path in skipped:
                raise Unsupported("a module can be adapted or trained whole, not both", where=path,
                                  remedy="take it out of targets or out of modules_to_save")
            chosen[path] = site
    return [chosen[path] for path in modules if path in chosen]
