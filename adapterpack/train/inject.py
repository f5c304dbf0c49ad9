"""Adapters put into a model, switched, and taken out again; the model stays the class that it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import AdapterpackError, SiteNotFound, UnknownAdapter, Unsupported, nearest
from ..methods import Site, method_of
from ..pack import peft_layout
from ..pack.pack import Pack, require_sites
from .layer import AdaptedLayer, SavedModule, module_at, own_modules
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
    whole = [_module_path(model, path) for path in config.modules_to_save]
    with _wrapping(model, name) as work:
        for site in select(model, config.targets, method.traits, tuple(whole)):
            cfg = config.at(site.path)
            known = _with_weight(model, site) if method.traits.reads_weight else site
            work.layer(site.path).add(name, method, cfg, method.init(cfg, known, rng))
        for path in whole:
            work.saved(path).add(name)
    model.requires_grad_(False)
    for module in work.touched:
        module.part(name).requires_grad_(True)
    return active(model, name)


def attach(model: nn.Module, pack: Pack, name: str | None = None, check_base: bool = True, check_canary: bool = True) -> nn.Module:
    """Puts a trained pack into ``model``, in place, under the pack's name, and makes it the active one.

    The model's own parameters are frozen; the pack's may be trained on. ``check_base=False`` leaves out the comparison of the model with
    the base that the pack was made for, and the replay of the pack's canary: four forward passes over a few tokens, made where the model
    is of the class that the canary was recorded on. ``check_canary=False`` leaves out the replay alone. After an error the model is as it
    was.

    Raises:
        BaseMismatch: the model is not the pack's base.
        SiteNotFound: the model lacks a module that the pack changes.
        NothingToDo: the adapter has no effect on this model.
        ParityError: the adapted model gives other logits than when the pack was made.
    """
    name = name or pack.name
    _refuse_taken(model, name)
    require_sites(pack, dict(own_modules(model)), type(model).__name__)
    if check_base:
        from .save import require_model_base  # noqa: PLC0415 - save imports this module

        require_model_base(model, pack)
    with _wrapping(model, name) as work:
        for adapter in pack.adapters():
            layer = work.layer(adapter.site.path)
            shapes = (layer.site.out_features, layer.site.in_features), (adapter.site.out_features, adapter.site.in_features)
            if shapes[0] != shapes[1]:
                raise SiteNotFound("a site has another shape in this model", where=adapter.site.path, expected=shapes[1], found=shapes[0])
            peft_layout.check_shapes(pack.method, adapter.config, layer.site, adapter.params, pack.name)
            layer.add(name, pack.method, adapter.config, adapter.params)
        for path, params in pack.full().items():
            work.saved(path).add(name, params, pack.manifest.task.labels)
    if check_base and check_canary:
        from .canary import verify_attached  # noqa: PLC0415 - as above

        try:
            verify_attached(model, pack, name)
        except BaseException:
            detach(model, name)
            raise
    for _, module in own_modules(model):
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
    return active(model, name)


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Takes one adapter (or all) out of ``model``; layers without adapters left are the original modules again.

    Raises:
        UnknownAdapter: the model has no adapter of that name.
    """
    names = adapter_names(model)
    if name is not None and name not in names:
        raise UnknownAdapter("the model has no such adapter", found=repr(name), remedy=nearest(name, names))
    empty: dict[nn.Module, nn.Module] = {}
    for module in _wrappers(model):
        for one in names if name is None else [name]:
            module.remove(one)
        if not module.names:
            empty[module] = module.base
    _swap(model, empty)
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
    for module in _wrappers(model):
        module.active = tuple(name for name in wanted if name in module.names)
    return model


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters in a model, sorted."""
    return sorted({name for module in _wrappers(model) for name in module.names})


def adapters_of(model: nn.Module, name: str) -> tuple[dict[Site, tuple[Any, dict[str, np.ndarray]]], dict[str, dict[str, np.ndarray]]]:
    """One adapter's parts as the pack wants them: site -> (config, parameters), and path -> parameters of modules trained whole.

    Raises:
        UnknownAdapter: the model has no adapter of that name.
    """
    wrappers = [module for module in _wrappers(model) if name in module.names]
    if not wrappers:
        raise UnknownAdapter("the model has no such adapter", found=repr(name), remedy=nearest(name, adapter_names(model)))
    adapters = {module.site: (module.methods[name][1], module.params(name)) for module in wrappers if isinstance(module, AdaptedLayer)}
    if not adapters:
        raise Unsupported("this adapter changes no layer by a method, so its method is not known here", where=name,
                          remedy="keep the pack that it came from")
    return adapters, {module.path: module.params(name) for module in wrappers if isinstance(module, SavedModule)}


def labels_of(model: nn.Module, name: str) -> tuple[str, ...] | None:
    """The labels that came with an attached adapter's head, or None."""
    return next((module.labels[name] for module in _wrappers(model) if isinstance(module, SavedModule) and module.labels.get(name)), None)


def method_in(model: nn.Module, name: str) -> Any:
    """The method of an adapter in a model."""
    return next(module.methods[name][0] for module in _wrappers(model) if isinstance(module, AdaptedLayer) and name in module.methods)


class _Work:
    """Wrappers for one adapter, made beside the model; :func:`_wrapping` puts them into it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.swaps: dict[nn.Module, nn.Module] = {}
        self.touched: list[AdaptedLayer | SavedModule] = []

    def layer(self, path: str) -> AdaptedLayer:
        """The adapted layer at one of the model's own paths."""
        outer = module_at(self.model, path)
        module = outer.base if isinstance(outer, SavedModule) else outer  # a layer that another adapter has trained whole
        if not isinstance(module, AdaptedLayer):
            site = site_at(path, module)
            if site is None:
                raise SiteNotFound("the module at this site cannot be adapted", where=path, found=type(module).__name__)
            module = self.swaps.setdefault(module, AdaptedLayer(module, site))  # type: ignore[assignment]
        assert isinstance(module, AdaptedLayer)
        self.touched.append(module)
        return module

    def saved(self, path: str) -> SavedModule:
        """The module with whole copies at one of the model's own paths."""
        module = module_at(self.model, path)
        if not isinstance(module, SavedModule):
            saved = SavedModule(module, path)
            self.swaps[module] = saved
            module = saved
        self.touched.append(module)
        return module


@contextmanager
def _wrapping(model: nn.Module, name: str) -> Iterator[_Work]:
    """Puts the wrappers made inside into the model when the block ends well; when it does not, the model is as it was."""
    work = _Work(model)
    try:
        yield work
    except BaseException:
        for module in work.touched:
            module.remove(name)
        raise
    _swap(model, work.swaps)


def _wrappers(model: nn.Module) -> Iterator[AdaptedLayer | SavedModule]:
    return (module for module in model.modules() if isinstance(module, AdaptedLayer | SavedModule))


def _swap(model: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> None:
    """Puts one module in another's place wherever it stands: a layer that is used at two places stays one layer."""
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            new = child
            while new in swaps:
                new = swaps[new]
            if new is not child:
                setattr(parent, leaf, new)
                if isinstance(parent, nn.TransformerEncoderLayer) and isinstance(new, AdaptedLayer):
                    new.register_forward_pre_hook(_called)


def _called(*_: Any) -> None:
    """A hook that does nothing: where there is one, torch's fused encoder calls its layers instead of reading their weights."""


def _module_path(model: nn.Module, name: str) -> str:
    paths = [path for path, _ in own_modules(model) if path]
    matches = [path for path in paths if path == name] or [path for path in paths if path.endswith(f".{name}")]
    if len(matches) != 1:
        raise SiteNotFound("modules_to_save must name one module each", found=f"{name!r}, which matches {', '.join(matches) or 'none'}",
                           remedy="name the whole path" if matches else nearest(name, {path.rpartition(".")[2] for path in paths}))
    return matches[0]


def _with_weight(model: nn.Module, site: Site) -> Site:
    weight: torch.Tensor = module_at(model, site.path).weight  # type: ignore[assignment]  # of the layer or its wrapper
    return dataclasses.replace(site, weight=weight.detach().float().cpu().numpy())


def _refuse_taken(model: nn.Module, name: str) -> None:
    if not name:
        raise AdapterpackError("an adapter needs a name", found=repr(name))
    if name in adapter_names(model):
        raise AdapterpackError("the model already has an adapter of that name", where=name,
                               remedy="choose another name, or detach it first")
