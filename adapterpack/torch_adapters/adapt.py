"""Attaches adapters to a model in place and detaches them again, without changing the model's class.

Both ways in build the same wrappers (:mod:`.wrap`): :func:`adapt` starts a fresh adapter from a method's
config, :func:`attach` loads a trained pack. If either fails, the model is left as it was before the call.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ..adapter_methods import (
    Calibration,
    Method,
    Site,
    SiteConfig,
    Tensors,
    check_shapes,
    is_stacked,
    method_of,
    resolve_configs,
)
from ..errors import (
    AdapterpackError,
    BaseMismatch,
    ConfigError,
    ParityError,
    SiteNotFound,
    Unsupported,
    nearest,
)
from ..manifest import MethodSites, require_combinable
from ..pack import Pack, as_pack
from ..pack.fits import require_sites
from ..pack.layer_kinds import may_be, require_certain
from ..paths import StrPath
from .adapter_checkpoints import follow
from .adapter_kinds import KINDS
from .calibration import measure
from .canaries.canary import verify_attached
from .checkpoint_names import drawn_modules, rename_sites
from .layers import (
    AdaptedTable,
    HeadLabels,
    Targets,
    adapter_names,
    as_list,
    base_modules,
    is_inside,
    is_named,
    name_outputs,
    require_names,
    require_unmerged,
    stop_observing,
    wrappers_of,
)
from .layers.active import active
from .layers.observers import observe
from .layers.sites import attachable_sites, left_out
from .layers.two_pass import Lead
from .layers.weights import keep_in_order, let_reorder, warn_of_misread_rows
from .model_base import difference, require_model_base
from .models.row_frequencies import rejoin_rows, separate_rows
from .unused import Watch, report, unused_layers
from .wrap import Work, is_linear, swap, wrapping

log = logging.getLogger(__name__)


def adapt(
    model: nn.Module,
    config: SiteConfig | Sequence[SiteConfig],
    name: str = "default",
    seed: int = 0,
    data: Iterable[Mapping[str, Any]] | None = None,
    allow_unused: bool = False,
) -> nn.Module:
    """Freezes ``model`` and puts a fresh trainable adapter into it, in place; only the adapter's parameters
    require gradients.

    ``config`` is a method's config, for instance ``LoRA(r=16, targets="all-linear")``, or several, of
    different methods at different sites, the adapter's main method first: ``[LoRA(),
    TrainableTokens(token_indices=(5,))]``. ``data``, batches of the model's keyword arguments, is for
    initialisations that look at samples (``eva``, ``corda``, ``lora_ga``). Modules missing from the model's
    checkpoint, such as a classifier's new head, are trained in full, like ``modules_to_save``: their initial
    weights are random and in no file, so an adapter on top of them could not be used again. Returns the same
    model.

    Layers that do not affect the model's output get no adapter, and a warning names them: layers that the
    model never calls, because it reads their weight directly, and layers whose output nothing depends on. A
    forward pass over an example finds them. Where no example can be made, the model's first real forward pass
    finds the layers that it does not call, and :func:`save` leaves them out. ``allow_unused`` adapts these
    layers as well.

    Raises:
        ConfigError: the initialisation wants data, and there are none.
        NothingToDo: the model uses none of the layers that a target names.
        SiteNotFound: a target matches no module.
        Unsupported: the method does not support a targeted layer.

    Example:
        >>> from adapterpack import LoRA
        >>> model = adapt(nn.Sequential(nn.Linear(4, 3)), LoRA(r=2))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        14
    """
    _refuse_taken(model, name)
    chosen = list(config) if isinstance(config, Sequence) else [config]
    if not chosen or not all(isinstance(one, SiteConfig) for one in chosen):
        raise ConfigError(
            "an adapter needs the configuration of a method",
            where="adapt",
            found=repr(config),
            expected="one such as LoRA(r=16), or several",
        )
    with _prepare(model):
        samples = None if data is None else list(data)
        return _adapt(model, chosen, name, np.random.default_rng(seed), samples, allow_unused)


@contextmanager
def _prepare(model: nn.Module) -> Iterator[None]:
    """Fixes the row order of a quantized model's codes while an adapter is attached.

    If attaching fails and leaves no other adapter, allows them to be reordered again.
    """
    warn_of_misread_rows(model)
    keep_in_order(model)
    try:
        yield
    except BaseException:
        if not adapter_names(model):
            let_reorder(model)
        raise


def _adapt(
    model: nn.Module,
    chosen: Sequence[SiteConfig],
    name: str,
    rng: np.random.Generator,
    samples: Any,
    allow_unused: bool,
) -> nn.Module:
    """Does the work of :func:`adapt` on a model that :func:`_prepare` has prepared."""
    whole = [_module_path(model, path) for site_config in chosen for path in site_config.modules_to_save]
    whole += _draw(model, chosen, whole)
    # Plan and check every config before touching the model, so that most mistakes cost no changes to it.
    plans = [_plan(model, name, site_config, whole, samples, allow_unused) for site_config in chosen]
    _require_apart(name, plans)
    with wrapping(model, name) as work:
        for plan in plans:
            shared = _init_shared(plan, work, rng)
            work.share(plan.method, shared)
            for site, cfg in plan.configs.items():
                params = partial(_fresh, plan.method, cfg, rng, plan.calibration.get(site.path), shared)
                work.adapter(
                    site.path,
                    plan.method,
                    cfg,
                    params,
                    "weight" in plan.needs,
                    secondary=plan is not plans[0],
                )
        for path in whole:
            work.saved_module(path)._add(name)
    # Freeze everything, then make only the new adapter trainable: other adapters stay frozen, too.
    model.requires_grad_(False)
    for module in work.touched:
        module._trainable(name)
    if unknown := [path for plan in plans for path in plan.unknown]:
        named = {target: paths for plan in plans for target, paths in plan.named.items()}
        observe(model, name, Watch(model, name, unknown, named))
    # Such a method must see whole sequences: ``Lead`` makes the model refuse a KV cache with it.
    if any(plan.method.reason_against("cache") for plan in plans):
        observe(model, name, Lead(model, name))
    follow(model)
    separate_rows(model)
    return active(model, name)


def _draw(model: nn.Module, configs: Sequence[SiteConfig], whole: Sequence[str]) -> list[str]:
    """Returns the paths of modules that the checkpoint does not hold and that no config names, for training
    in full.

    ``whole`` are the paths that ``modules_to_save`` names; modules that a target names explicitly are left to
    their method.
    """
    named = [target for config in configs for target in as_list(config.targets)]
    drawn = [
        path for path in drawn_modules(model) if not is_inside(path, whole) and not is_named(path, named)
    ]
    if drawn:
        log.info("the checkpoint does not hold %s: trained whole", ", ".join(drawn))
    return drawn


class _Plan(NamedTuple):
    """How one config applies to a model: its method, the config at each site, and the sites' calibration.

    ``unknown`` lists the layers for which no example could show whether the model uses them; ``named`` maps
    each target to the layers that it names.
    """

    method: Method
    configs: dict[Site, Any]
    needs: frozenset[str]
    calibration: Mapping[str, Calibration]
    unknown: list[str]
    named: Mapping[str, list[str]]


def _plan(
    model: nn.Module, name: str, config: SiteConfig, whole: list[str], data: Any, allow_unused: bool
) -> _Plan:
    """Resolves ``config`` against ``model``: selects the sites, drops unused layers, calibrates and allocates
    ranks.
    """
    method = method_of(config)
    kind = KINDS[method.kind]
    config = kind.ready(model, config)
    sites = kind.select(model, config.targets, method.traits, tuple(whole))
    _say_left_out(model, config.targets, sites)
    modules = {path for path, _ in base_modules(model)}
    layers = [] if allow_unused else [site.path for site in sites if site.path in modules]
    named = {
        target: [path for path in layers if is_named(path, [target])] for target in as_list(config.targets)
    }
    unused = unused_layers(model, layers, data or ())
    if unused:
        report(name, unused, named)
        sites = [site for site in sites if site.path not in unused]
    if not sites:
        raise ConfigError(
            "the adapter would change no layer",
            where=f"adapter '{name}', targets",
            found=repr(config.targets),
            expected="names of layers, or a word: all-linear",
        )
    needs = method.training.needs(config) if method.training.needs is not None else frozenset()
    measured = measure(model, sites, needs, data)
    if method.training.allocate is not None:
        # Allocating ranks compares the sites, so it needs the calibration of all of them at once.
        config = method.training.allocate(
            config, [dataclasses.replace(site, calibration=measured.get(site.path)) for site in sites]
        )
    configs = resolve_configs(method, [config.at(site.path) for site in sites], sites)
    by_site = dict(zip(sites, configs, strict=True))
    return _Plan(method, by_site, needs, measured, layers if unused is None else [], named)


def _init_shared(plan: _Plan, work: Work, rng: np.random.Generator) -> Tensors:
    """Returns the initial values of the parameters that all sites of a plan share; empty if the method has
    none.
    """
    shared = plan.method.storage.shared
    sites = list(plan.configs)
    if shared is None:
        return {}
    if shared.reads_weights:
        sites = [work.site_with_weight(site.path, plan.method) for site in sites]
    return shared.init(next(iter(plan.configs.values())), sites, rng)


def _say_left_out(model: nn.Module, targets: Targets, sites: Sequence[Site]) -> None:
    """Logs which layers of a mixture-of-experts model ``all-linear`` leaves unadapted."""
    if "all-linear" not in as_list(targets):
        return
    left = left_out(model, sites)
    if any("experts" in name for name in left):
        log.info(
            "all-linear takes %d layers and leaves %s; all-experts takes the experts",
            len(sites),
            ", ".join(f"{name} ({count})" for name, count in sorted(left.items())),
        )


def _require_apart(name: str, plans: Sequence[_Plan]) -> None:
    """Raises before training if the methods of one adapter cannot be combined in one pack."""
    first, *rest = (
        MethodSites(plan.method, {site: (cfg, {}) for site, cfg in plan.configs.items()}) for plan in plans
    )
    taken = {site.path for site in first.adapters}
    for secondary in rest:
        require_combinable(name, first, secondary, taken)
        taken |= {site.path for site in secondary.adapters}


def attach(
    model: nn.Module,
    pack: Pack | StrPath,
    name: str | None = None,
    check_base: bool = True,
    check_canary: bool = True,
) -> nn.Module:
    """Puts a trained pack, or the one in a folder, into ``model``, in place, under the pack's name, and makes
    it the active one.

    The model's own parameters are frozen; the pack's can be trained further. While the adapter is active, the
    model's config holds the labels of its head, so that pipelines show them.

    By default ``attach`` compares the model with the base that the pack was made for and replays the pack's
    canary: four forward passes over a few tokens, if the model has the class that the canary was recorded on.
    ``check_base=False`` skips both, ``check_canary=False`` only the replay. If an error is raised, the model
    is unchanged. A base that is quantized differently than in training only causes a ``UserWarning``, which
    says how far its logits are off.

    Raises:
        BaseMismatch: the model is not the pack's base.
        SiteNotFound: the model lacks a module that the pack changes.
        NothingToDo: the adapter has no effect on this model.
        ParityError: the adapted model gives other logits than when the pack was made.
    """
    pack = as_pack(pack)
    name = name or pack.name
    _refuse_taken(model, name)
    with _prepare(model):
        return _attach(model, pack, name, check_base, check_canary)


def _attach(model: nn.Module, pack: Pack, name: str, check_base: bool, check_canary: bool) -> nn.Module:
    """Does the work of :func:`attach` on a model that :func:`_prepare` has prepared."""
    sites = attachable_sites(model)
    pack = rename_sites(model, pack, sites)
    require_sites(pack, sites, type(model).__name__)
    verdict = require_model_base(model, pack) if check_base else None
    with wrapping(model, name) as work:
        shared = pack.shared()
        groups = {group.path: group for group in pack.groups}
        work.share(pack.method, shared)
        for adapter in pack.adapters(lambda group: work.shape_of(group, pack.method_of(group))):
            secondary = adapter.method.name != pack.method.name
            # The shared parameters belong to the pack's main method alone; ``work.share`` has set them
            # already.
            site_params = {
                key: value for key, value in adapter.params.items() if secondary or key not in shared
            }
            init: Any = lambda _, params=site_params: params  # noqa: E731
            layer = work.adapter(
                adapter.site.path,
                adapter.method,
                adapter.config,
                init,
                secondary=secondary,
                kind=adapter.site.kind,
            )
            group = groups[adapter.site.path]
            if (
                adapter.site.kind != layer._site.kind
                and not (is_linear(adapter.site) and is_linear(layer._site))
                and not may_be(pack, group, layer._site.kind)
            ):
                raise Unsupported(
                    "the pack was made for another kind of layer",
                    where=adapter.site.path,
                    expected=adapter.site.kind,
                    found=layer._site.kind,
                )
            require_certain(pack, group, layer._site)
            for side in ("out_features", "in_features"):
                if getattr(adapter.site, side) not in {0, getattr(layer._site, side)}:
                    raise SiteNotFound(
                        "a site has another shape in this model",
                        where=f"{adapter.site.path}, {side}",
                        expected=getattr(adapter.site, side),
                        found=getattr(layer._site, side),
                    )
            check_shapes(adapter.method, adapter.config, layer._site, site_params, pack.name)
        for path, params in pack.full().items():
            work.saved_module(path)._add(name, params, HeadLabels.of(pack))
    if pack.method.reason_against("cache"):
        observe(model, name, Lead(model, name))
    if check_base:
        # A variant of the base has different weights and so different logits: its canary would always fail.
        replayed = check_canary and (verdict is None or verdict.name != "variant")
        _require_behaviour(model, pack, name, replayed)
    # Only the base is frozen: the pack's own parameters stay trainable.
    for _, module in base_modules(model):
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
    follow(model)
    separate_rows(model)
    return active(model, name)


def _require_behaviour(model: nn.Module, pack: Pack, name: str, replayed: bool) -> None:
    """Replays the canary if ``replayed``, and warns if the base is quantized differently than in training.

    If the replay fails, detaches the pack and raises; the error blames the quantization if that differs.
    """
    try:
        error = verify_attached(model, pack, name) if replayed else None
    except BaseException as failure:
        detach(model, name)
        differs = difference(model, pack, None) if isinstance(failure, BaseMismatch | ParityError) else None
        if differs is None:
            raise
        raise BaseMismatch(differs, where=pack.name) from failure
    if (differs := difference(model, pack, error)) is not None:
        warnings.warn(differs, stacklevel=4)


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Takes one adapter (or all) out of ``model``; layers without adapters left are the original modules
    again.

    Raises:
        UnknownAdapter: the model has no adapter of that name.
    """
    require_unmerged(model)
    names = adapter_names(model) if name is None else [name]
    require_names(model, names)
    empty: dict[nn.Module, nn.Module] = {}
    stop_observing(model, names)
    for module in wrappers_of(model):
        for adapter in names:
            module._remove(adapter)
        if not module._names:
            empty[module] = module._base
            if isinstance(module, AdaptedTable):
                module._release()
    swap(model, empty)
    follow(model)
    name_outputs(model)
    if not adapter_names(model):
        let_reorder(model)
        # The last adapter is gone, so undo what attaching changed in the base.
        rejoin_rows(model)
    return model


def _fresh(
    method: Method,
    cfg: Any,
    rng: np.random.Generator,
    calibration: Calibration | None,
    shared: Tensors,
    site: Site,
) -> Tensors:
    """Returns the initial parameters of a site; for a stack of matrices, initialises each matrix and stacks
    the results.
    """
    if not is_stacked(site.kind):
        return method.init(cfg, dataclasses.replace(site, calibration=calibration, shared=shared), rng)
    weights = [None] * site.stack if site.weight is None else site.weight
    per_matrix = [method.init(cfg, dataclasses.replace(site, weight=weight), rng) for weight in weights]
    return {name: np.stack([params[name] for params in per_matrix]) for name in per_matrix[0]}


def _module_path(model: nn.Module, name: str) -> str:
    """Returns the path of the only module that ``name``, a full path or the end of one, matches; raises if it
    matches none or several.
    """
    paths = [path for path, _ in base_modules(model) if path]
    matches = [path for path in paths if path == name] or [path for path in paths if is_named(path, [name])]
    if len(matches) != 1:
        raise SiteNotFound(
            "modules_to_save must name one module each",
            found=f"{name!r}, which matches {', '.join(matches) or 'none'}",
            remedy="name the whole path"
            if matches
            else nearest(name, {path.rpartition(".")[2] for path in paths}),
        )
    return matches[0]


def _refuse_taken(model: nn.Module, name: str) -> None:
    """Raises if ``name`` is not a valid name for a new adapter, is in use, or the model has adapters merged
    into its weights.
    """
    require_unmerged(model)
    if not isinstance(name, str) or not name:
        raise AdapterpackError("an adapter needs a name", found=repr(name), expected="a text")
    if name in adapter_names(model):
        raise AdapterpackError(
            "the model already has an adapter of that name",
            where=name,
            remedy="choose another name, or detach it first",
        )
