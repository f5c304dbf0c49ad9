"""Adapters put into a model, switched, and taken out again; the model stays the class that it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import AdapterpackError, NothingToDo, SiteNotFound, UnknownAdapter, nearest
from ..methods import Site, method_of
from ..pack import peft_layout
from ..pack.pack import Pack, require_sites
from .layer import AdaptedLayer, SavedModule, own_modules
from .sites import select, site_at


def adapt(model: nn.Module, config: Any, name: str = "default", seed: int = 0) -> nn.Module:
    """Freezes ``model`` and puts a fresh trainable adapter into it, in place; only the adapter's parameters require gradients.

    ``config`` is a method's config, for instance ``LoRA(r=16, targets="all-linear")``. Returns the same model.

    Raises:
        SiteNotFound: a target matches no module.
        Unsupported: the method does not support a targeted layer.

    Example:
        >>> from adapterpack import LoRA
        >>> model = adapt(nn.Sequential(nn.Linear(4, 3)), LoRA(r=2))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        14
    """
    method, rng = method_of(config), np.random.default_rng(seed)
    _refuse_taken(model, name)
    sites = select(model, config.targets, method.traits, config.modules_to_save)
    model.requires_grad_(False)
    for site in sites:
        cfg = config.at(site.path)
        known = _with_weight(model, site) if method.traits.reads_weight else site
        _adapted(model, site).add(name, method, cfg, method.init(cfg, known, rng))
    for path in config.modules_to_save:
        _saved(model, _module_path(model, path)).add(name)
    return active(model, name)


def attach(model: nn.Module, pack: Pack, name: str | None = None, check_base: bool = True) -> nn.Module:
    """Puts a trained pack into ``model``, in place, under the pack's name, and makes it the active one.

    ``check_base=False`` leaves out the comparison of the model with the base that the pack was made for.

    Raises:
        BaseMismatch: the model is not the pack's base.
        SiteNotFound: the model lacks a module that the pack changes.
    """
    name = name or pack.name
    _refuse_taken(model, name)
    require_sites(pack, dict(own_modules(model)), type(model).__name__)
    if check_base:
        from .save import require_model_base  # noqa: PLC0415 - save imports this module

        require_model_base(model, pack)
    for adapter in pack.adapters():
        layer = _adapted(model, adapter.site)
        shapes = (layer.site.out_features, layer.site.in_features), (adapter.site.out_features, adapter.site.in_features)
        if shapes[0] != shapes[1]:
            raise SiteNotFound("a site has another shape in this model", where=adapter.site.path, expected=shapes[1], found=shapes[0])
        peft_layout.check_shapes(pack.method, adapter.config, layer.site, adapter.params, pack.name)
        layer.add(name, pack.method, adapter.config, adapter.params)
    for path, params in pack.full().items():
        _saved(model, path).add(name, params)
    return active(model, name)


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Takes one adapter (or all) out of ``model``; layers without adapters left are the original modules again.

    Raises:
        UnknownAdapter: the model has no adapter of that name.
    """
    names = adapter_names(model)
    if name is not None and name not in names:
        raise UnknownAdapter("the model has no such adapter", found=repr(name), remedy=nearest(name, names))
    for path, module in list(_wrappers(model)):
        for one in names if name is None else [name]:
            module.remove(one)
        if not (module.adapters if isinstance(module, AdaptedLayer) else module.copies):
            _replace(model, path, module.base)
    return model


def active(model: nn.Module, names: str | list[str] | None) -> nn.Module:
    """Chooses which adapters take part in the forward pass: one, several (applied in order), or None for the base alone.

    Raises:
        UnknownAdapter: the model has no adapter of that name.
    """
    wanted = [names] if isinstance(names, str) else list(names or ())
    known = adapter_names(model)
    for name in wanted:
        if name not in known:
            raise UnknownAdapter("the model has no such adapter", found=repr(name), remedy=nearest(name, known))
    for _, module in _wrappers(model):
        here = module.methods if isinstance(module, AdaptedLayer) else {name for name in wanted if module.has(name)}
        module.active = tuple(name for name in wanted if name in here)
    return model


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters in a model, sorted."""
    return sorted({name for _, module in _wrappers(model) if isinstance(module, AdaptedLayer) for name in module.methods})


def adapters_of(model: nn.Module, name: str) -> tuple[dict[Site, tuple[Any, dict[str, np.ndarray]]], dict[str, dict[str, np.ndarray]]]:
    """One adapter's parts as the pack wants them: site -> (config, parameters), and path -> parameters of modules trained whole.

    Raises:
        NothingToDo: the model has no adapter of that name.
    """
    adapters = {module.site: (module.methods[name][1], module.params(name))
                for _, module in _wrappers(model) if isinstance(module, AdaptedLayer) and name in module.methods}
    if not adapters:
        raise NothingToDo("the model has no such adapter", found=repr(name), remedy=nearest(name, adapter_names(model)))
    full = {path: module.params(name) for path, module in _wrappers(model)
            if isinstance(module, SavedModule) and module.has(name)}
    return adapters, full


def method_in(model: nn.Module, name: str) -> Any:
    """The method of an adapter in a model."""
    return next(module.methods[name][0] for _, module in _wrappers(model) if isinstance(module, AdaptedLayer) and name in module.methods)


def _wrappers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer | SavedModule]]:
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLayer | SavedModule):
            yield path, module


def _adapted(model: nn.Module, site: Site) -> AdaptedLayer:
    module = model.get_submodule(site.path)
    if isinstance(module, AdaptedLayer):
        return module
    own = site_at(site.path, module)
    if own is None:
        raise SiteNotFound("the module at this site cannot be adapted", where=site.path, found=type(module).__name__)
    layer = AdaptedLayer(module.requires_grad_(False), own)
    _replace(model, site.path, layer)
    return layer


def _saved(model: nn.Module, path: str) -> SavedModule:
    module = model.get_submodule(path)
    if isinstance(module, SavedModule):
        return module
    saved = SavedModule(module.requires_grad_(False))
    _replace(model, path, saved)
    return saved


def _module_path(model: nn.Module, name: str) -> str:
    paths = [path for path, _ in own_modules(model)]
    matches = [path for path in paths if path == name or path.endswith(f".{name}")]
    if len(matches) != 1:
        raise SiteNotFound("modules_to_save must name one module each", found=f"{name!r} matches {len(matches)}",
                           remedy=nearest(name, {path.rpartition(".")[2] for path in paths if path}))
    return matches[0]


def _with_weight(model: nn.Module, site: Site) -> Site:
    weight: torch.Tensor = model.get_submodule(site.path).weight  # type: ignore[assignment]  # of the layer or its wrapper
    return Site(site.path, site.in_features, site.out_features, site.kind, site.bias, weight.detach().float().cpu().numpy())


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    module.train(model.training)
    setattr(model.get_submodule(parent), leaf, module)


def _refuse_taken(model: nn.Module, name: str) -> None:
    if name in adapter_names(model):
        raise AdapterpackError("the model already has an adapter of that name", where=name, remedy="choose another name, or detach it first")
