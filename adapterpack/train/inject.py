"""Adapters put into a model, switched, and taken out again; the model stays the class that it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..errors import AdapterpackError, SiteNotFound, UnknownAdapter, Unsupported, nearest
from ..methods import LAYOUTS, Method, Seen, Site, SiteConfig, is_stacked, method_of, settled, to_matrix
from ..pack.manifest import Group
from ..pack.pack import Pack, require_sites
from ..pack.shapes import check_shapes
from .acting import forget, tell
from .first_pass import lead, release
from .kinds import KINDS
from .layer import Adapted, SavedModule, Wrapper, as_numpy, as_parameter, module_at, own_modules
from .seen import measure
from .sites import known_sites
from .table import AdaptedTable


def adapt(
    model: nn.Module, config: SiteConfig, name: str = "default", seed: int = 0, data: Iterable[Mapping[str, Any]] | None = None
) -> nn.Module:
    """Freezes ``model`` and puts a fresh trainable adapter into it, in place; only the adapter's parameters require gradients.

    ``config`` is a method's config, for instance ``LoRA(r=16, targets="all-linear")``. ``data``, batches of the model's keyword
    arguments, is for initialisations that look at samples (``eva``, ``corda``, ``lora_ga``). Returns the same model.

    Raises:
        ConfigError: the initialisation wants data, and there are none.
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
    kind = KINDS[method.kind]
    config = kind.ready(model, config)
    whole = [_module_path(model, path) for path in config.modules_to_save]
    sites = kind.select(model, config.targets, method.traits, tuple(whole))
    needs = method.needs(config) if method.needs is not None else frozenset()
    seen = measure(model, sites, needs, data)
    if method.plan is not None:
        config = method.plan(config, [dataclasses.replace(site, seen=seen.get(site.path)) for site in sites])
    configs = settled(method, [config.at(site.path) for site in sites], sites)
    common = method.shared.init(configs[0], sites, rng) if method.shared is not None else {}
    with _wrapping(model, name, method, common) as work:
        for site, cfg in zip(sites, configs, strict=True):
            work.adapter(site.path, cfg, partial(_fresh, method, cfg, rng, seen.get(site.path)), "weight" in needs)
        for path in whole:
            work.saved(path).add(name)
    model.requires_grad_(False)
    for module in work.touched:
        module.trainable(name)
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
    require_sites(pack, known_sites(model), type(model).__name__)
    known = None
    if check_base:
        from .save import require_model_base  # noqa: PLC0415 - save imports this module

        known = require_model_base(model, pack)
    with _wrapping(model, name, pack.method, pack.shared()) as work:
        for adapter in pack.adapters(work.shape_of):
            own = {key: value for key, value in adapter.params.items() if key not in work.shared}
            layer = work.adapter(adapter.site.path, adapter.config, partial(_stored, own))
            if adapter.site.kind != layer.site.kind and not (_linear(adapter.site) and _linear(layer.site)):
                raise Unsupported("the pack was made for another kind of layer", where=adapter.site.path, expected=adapter.site.kind,
                                  found=layer.site.kind)
            for side in ("out_features", "in_features"):
                if getattr(adapter.site, side) not in {0, getattr(layer.site, side)}:
                    raise SiteNotFound("a site has another shape in this model", where=f"{adapter.site.path}, {side}",
                                       expected=getattr(adapter.site, side), found=getattr(layer.site, side))
            check_shapes(pack.method, adapter.config, layer.site, own, pack.name)
        for path, params in pack.full().items():
            work.saved(path).add(name, params, pack.manifest.task.labels)
    if pack.method.one_pass:
        lead(model, name, pack.method.first_pass)
    if check_base and check_canary and (known is None or known.name != "variant"):  # whose other bytes give other logits
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
    for one in names if name is None else [name]:
        release(model, one)
    for module in _wrappers(model):
        for one in names if name is None else [name]:
            module.remove(one)
        if not module.names:
            empty[module] = module.base
            if isinstance(module, AdaptedTable):
                module.release()
    _swap(model, empty)
    forget(model, names if name is None else [name])
    return model


def active(model: nn.Module, names: str | list[str] | None) -> nn.Module:
    """Chooses which adapters take part in the forward pass: one, several (applied in order), or None for the base alone.

    Raises:
        UnknownAdapter: the model has no adapter of that name.
        Unsupported: several of a method of which only one can be active, such as prompts.
    """
    wanted = [names] if isinstance(names, str) else list(names or ())
    known = adapter_names(model)
    for name in wanted:
        if name not in known:
            raise UnknownAdapter("the model has no such adapter", found=repr(name), remedy=nearest(name, known))
    wrappers = list(_wrappers(model))
    for module in wrappers:
        alone = [name for name in wanted if isinstance(module, Adapted) and name in module.names and module.exclusive(name)]
        if len(alone) > 1:
            raise Unsupported("only one of these adapters can be active at a time", where=module.site.path, found=", ".join(alone),
                              remedy="choose one of them")
    for module in wrappers:
        module.active = tuple(name for name in wanted if name in module.names)
    return model


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters in a model, sorted."""
    return sorted({name for module in _wrappers(model) for name in module.names})


class Parts(NamedTuple):
    """One adapter out of a model, as a pack wants it: its method, site -> (config, parameters) in their final form, the parameters that
    all sites share, and path -> parameters of modules that were trained whole."""

    method: Method
    adapters: dict[Site, tuple[Any, dict[str, np.ndarray]]]
    shared: dict[str, np.ndarray]
    full: dict[str, dict[str, np.ndarray]]


def parts_of(model: nn.Module, name: str) -> Parts:
    """The adapter of that name.

    Raises:
        UnknownAdapter: the model has no adapter of that name.
    """
    wrappers = [module for module in _wrappers(model) if name in module.names]
    if not wrappers:
        raise UnknownAdapter("the model has no such adapter", found=repr(name), remedy=nearest(name, adapter_names(model)))
    adapted = [module for module in wrappers if isinstance(module, Adapted)]
    if not adapted:
        raise Unsupported("this adapter changes no layer by a method, so its method is not known here", where=name,
                          remedy="keep the pack that it came from")
    order = {path: place for place, path in enumerate(known_sites(model))}  # of the wrappers of one module, the last one stands outside
    adapted.sort(key=lambda module: order.get(module.site.path, len(order)))
    method = adapted[0].methods[name][0]
    adapters = {module.site: (module.methods[name][1], module.params(name)) for module in adapted}
    if method.bake is not None:
        adapters = {site: _baked(method, cfg, params, site) for site, (cfg, params) in adapters.items()}
    shared = {key: as_numpy(value) for key, value in adapted[0].shared(name).items()}
    return Parts(method, adapters, shared, {module.path: module.params(name) for module in wrappers if isinstance(module, SavedModule)})


def labels_of(model: nn.Module, name: str) -> tuple[str, ...] | None:
    """The labels that came with an attached adapter's head, or None."""
    return next((module.labels[name] for module in _wrappers(model) if isinstance(module, SavedModule) and module.labels.get(name)), None)


def _fresh(method: Method, cfg: Any, rng: np.random.Generator, seen: Seen | None, site: Site) -> Mapping[str, np.ndarray]:
    """What a site begins with; at a stack of matrices, what each of them begins with."""
    if not is_stacked(site.kind):
        return method.init(cfg, dataclasses.replace(site, seen=seen), rng)
    weights = [None] * site.stack if site.weight is None else site.weight
    each = [method.init(cfg, dataclasses.replace(site, weight=weight), rng) for weight in weights]
    return {name: np.stack([one[name] for one in each]) for name in each[0]}


def _baked(method: Method, cfg: Any, params: dict[str, np.ndarray], site: Site) -> tuple[Any, dict[str, np.ndarray]]:
    """What a pack stores of a site; of a stack, what it stores of each matrix."""
    assert method.bake is not None
    if not is_stacked(site.kind):
        return method.bake(cfg, params, site)
    each = [method.bake(cfg, {name: value[number] for name, value in params.items()}, site) for number in range(site.stack)]
    return each[0][0], {name: np.stack([one[name] for _, one in each]) for name in each[0][1]}


def _linear(site: Site) -> bool:
    """Whether a site is a linear layer: whichever way it stores its weight, an adapter of it is the same."""
    return site.kind in LAYOUTS and LAYOUTS[site.kind].linear


def _stored(params: Mapping[str, np.ndarray], site: Site) -> Mapping[str, np.ndarray]:
    return params


class _Work:
    """Wrappers for one adapter, made beside the model; :func:`_wrapping` puts them into it."""

    def __init__(self, model: nn.Module, name: str, method: Method, shared: Mapping[str, np.ndarray]) -> None:
        self.model, self.name, self.method = model, name, method
        device = next(model.parameters()).device
        self.shared = {key: as_parameter(value, device) for key, value in shared.items()}
        self.swaps: dict[nn.Module, nn.Module] = {}
        self.touched: list[Adapted | SavedModule] = []
        self._constants: dict[int, tuple[np.ndarray, nn.Parameter]] = {}

    def adapter(self, path: str, cfg: Any, params: Callable[[Site], Mapping[str, np.ndarray]], weight: bool = False) -> Adapted:
        """The wrapper at a site with the new adapter in it; ``params`` is asked with the site, and its ``weight`` if that is wanted."""
        wrapper = self._wrapper(path)
        self.touched.append(wrapper)
        known = _with_weight(wrapper) if weight or self.method.traits.reads_weight else wrapper.site
        own = params(known)
        made = self.method.constants(cfg, known) if self.method.constants is not None else {}
        device = next(wrapper.base.parameters()).device
        wrapper.add(self.name, self.method, cfg, own, {key: self._constant(value, device) for key, value in made.items()}, self.shared)
        return wrapper

    def shape_of(self, group: Group) -> tuple[int, int]:
        """The shape of the weight at a group's site; a width that the pack says stays, to be compared with the layer's."""
        site = self._wrapper(group.path).site
        return group.out_features or site.out_features, group.in_features or site.in_features

    def _constant(self, value: np.ndarray, device: torch.device) -> nn.Parameter:
        """A constant as a tensor; the same array at another site is the same tensor."""
        if id(value) not in self._constants:
            self._constants[id(value)] = value, as_parameter(value, device)
        return self._constants[id(value)][1]

    def _wrapper(self, path: str) -> Adapted:
        kind = KINDS[self.method.kind]
        outer = kind.at(self.model, path)
        if outer is self.model:
            raise Unsupported("the model itself owns this parameter, and cannot be replaced inside itself", where=path,
                              remedy="put the model into a container, such as nn.Sequential")
        chain = [outer.base if isinstance(outer, SavedModule) else outer]  # a layer that another adapter has trained whole
        while isinstance(chain[-1], Wrapper):
            chain.append(chain[-1].base)
        module = chain[0 if kind.outermost else -1]
        while module in self.swaps:
            module = self.swaps[module]
            chain.append(module)
        for each in chain:
            if isinstance(each, Adapted) and isinstance(each, kind.holder) and (each.site.path == path or not each.several):
                if each.site.kind not in self.method.traits.layers and not _linear(each.site):
                    raise Unsupported("another adapter changes this layer in another way", where=path, found=each.site.kind,
                                      expected=", ".join(self.method.traits.layers), remedy="detach it first")
                return each
        wrapper = kind.wrap(self.model, module, path, self.method.traits)
        self.swaps[module] = wrapper
        return wrapper

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
def _wrapping(model: nn.Module, name: str, method: Method, shared: Mapping[str, np.ndarray]) -> Iterator[_Work]:
    """Puts the wrappers made inside into the model when the block ends well; when it does not, the model is as it was."""
    work = _Work(model, name, method, shared)
    try:
        yield work
        tell(model, name, [module for module in work.touched if isinstance(module, Adapted)])
    except BaseException:
        for module in work.touched:
            module.remove(name)
        forget(model, [name])
        raise
    _swap(model, work.swaps)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for wrapper in work.swaps.values():
        if head is not None and isinstance(wrapper, AdaptedTable) and getattr(head, "weight", None) is wrapper.weight:
            wrapper.follow(head.base if isinstance(head, Adapted) else head)


def _wrappers(model: nn.Module) -> Iterator[Adapted | SavedModule]:
    return (module for module in model.modules() if isinstance(module, Adapted | SavedModule))


def _swap(model: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> None:
    """Puts one module in another's place wherever it stands: a layer that is used at two places stays one layer."""
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            new = child
            while new in swaps:
                new = swaps[new]
            if new is not child:
                setattr(parent, leaf, new)
                if isinstance(parent, nn.TransformerEncoderLayer) and isinstance(new, Adapted):
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


def _with_weight(wrapper: Adapted) -> Site:
    """The site with its weight and bias, float32."""
    stored, bias = wrapper.stored
    weight = to_matrix(wrapper.site.kind, as_numpy(stored))
    return dataclasses.replace(wrapper.site, weight=weight, base_bias=None if bias is None else as_numpy(bias))


def _refuse_taken(model: nn.Module, name: str) -> None:
    if not name:
        raise AdapterpackError("an adapter needs a name", found=repr(name))
    if name in adapter_names(model):
        raise AdapterpackError("the model already has an adapter of that name", where=name,
                               remedy="choose another name, or detach it first")
