"""Wraps decoder layers so that a shadow state corrects their inputs, and carries that state through each pass
of the model.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from transformers import Cache, DynamicCache, PreTrainedModel

from adapterpack.adapter_methods import Site, Traits
from adapterpack.errors import BaseMismatch, Unsupported
from adapterpack.torch_adapters.adapter_kinds import Kind
from adapterpack.torch_adapters.layers.block_targets import block_at, select_blocks
from adapterpack.torch_adapters.layers.layer import Adapted, NewAdapter
from adapterpack.torch_adapters.layers.prompts import CACHES
from adapterpack.torch_adapters.layers.wrapper import innermost, module_at

from .backbone import built, drawn, embeds_are_shared, shapes_of
from .form import TRAITS, ShadowForm, advance, inject
from .method import BACKBONE, PROJECTION, ShadowSite

_RUN = "_adapterpack_shadow"
"""The attribute of a model that holds its run, and of a cache that holds the backbone's with the name of the
adapter.
"""


class ShadowedLayer(Adapted):
    """A layer of a decoder with any number of named adapters, of which one is active at a time; its state
    comes from the :class:`Run`.
    """

    _whole_batch = "its second model runs once for the whole batch"

    def __init__(self, base: nn.Module, site: Site, trunk: PreTrainedModel) -> None:
        super().__init__(base, site)
        self._run = run_of(trunk)

    def _run_active(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's output for the input that the active adapter makes of its own; the state moves on."""
        name, (hidden, base) = self._active[-1], self._enter(args, kwargs)
        state = self._run.state
        if state is None:
            raise Unsupported(
                "this layer was called by itself, and its adapter begins where the model does",
                where=self._site.path,
                found=name,
                remedy="call the whole model",
            )
        cfg, dtype = self._held[name].config, torch.promote_types(hidden.dtype, state.dtype)
        form: ShadowForm = self._normal_form(name, dtype)
        drop = partial(functional.dropout, p=cfg.dropout) if self.training and cfg.dropout else None
        entering = self._weigh(name, hidden, inject(form, hidden.to(dtype), state, drop).to(hidden.dtype))
        output = base(entering)
        given = output[0] if isinstance(output, tuple) else output
        self._run.state = advance(form, given.to(dtype), state)
        return output

    def _add(self, name: str, adapter: NewAdapter) -> None:
        """Add an adapter; its first layer has its backbone built.

        Raises:
            BaseMismatch: the tensors are not those of a backbone that mirrors this model.
        """
        super()._add(name, adapter)
        self._run.take(self, name)

    def _remove(self, name: str) -> None:
        """Remove an adapter; with its last layer its backbone goes."""
        if name in self._names:
            super()._remove(name)
            self._run.release(self, name)


class Run:
    """One model's passes with a shadow state: begins it before the model's layers, and puts the backbone's
    cache beside the model's.
    """

    def __init__(self, trunk: PreTrainedModel) -> None:
        self.state: torch.Tensor | None = None
        self._trunk = trunk
        self._takes = tuple(inspect.signature(type(trunk).forward).parameters)[1:]
        self._cache_name = next((name for name in CACHES if name in self._takes), "")
        self._layers: dict[str, list[ShadowedLayer]] = {}
        self._backbones: dict[str, nn.Module] = {}
        self._handles: list[Any] = []
        self._cache: Any = None

    def take(self, layer: ShadowedLayer, name: str) -> None:
        """Counts a layer among those of an adapter."""
        if name not in self._backbones:
            self._backbones[name] = _fitting(self._trunk, layer, name)
        self._layers.setdefault(name, []).append(layer)
        if not self._handles:
            self._handles = [
                self._trunk.register_forward_pre_hook(self._begin, with_kwargs=True),
                self._trunk.register_forward_hook(self._end, always_call=True),
            ]

    def release(self, layer: ShadowedLayer, name: str) -> None:
        """Forgets a layer of an adapter; with the last of all, the model's calls are its own again."""
        left = [other for other in self._layers.pop(name, ()) if other is not layer]
        if left:
            self._layers[name] = left
        else:
            self._backbones.pop(name, None)
        if not self._layers:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            self._trunk.__dict__.pop(_RUN, None)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.state = self._cache = None
        active = [
            (name, layers[0])
            for name, layers in self._layers.items()
            if any(name in layer._active for layer in layers)
        ]
        if not active:
            return
        name, layer = active[-1]
        inputs = {**dict(zip(self._takes, args, strict=False)), **kwargs}
        shared, cfg = layer._shared(name), layer._held[name].config
        own = {
            key.removeprefix(f"{BACKBONE}_").replace("/", "."): value
            for key, value in shared.items()
            if key.startswith(f"{BACKBONE}_")
        }
        passed = [
            key
            for key in ("attention_mask", "position_ids")
            if inputs.get(key) is not None and key in self._takes
        ]
        given: dict[str, Any] = {key: inputs[key] for key in passed}
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        dtype = next(value.dtype for value in own.values() if value.is_floating_point())
        if embeds is None and embeds_are_shared(self._trunk, cfg):
            embeds = self._trunk.get_input_embeddings()(ids)
        given |= (
            {"input_ids": ids}
            if embeds is None
            else {"inputs_embeds": embeds.to(torch.promote_types(embeds.dtype, dtype))}
        )
        past = self._past(inputs, name)
        self._cache = past
        backbone = self._backbones[name]
        _move_tables(backbone, next(iter(own.values())).device)
        backbone.train(module.training)
        wide = given["inputs_embeds"].dtype if "inputs_embeds" in given else dtype
        tensors = {key: value.to(wide) if value.is_floating_point() else value for key, value in own.items()}
        output = functional_call(
            backbone,
            tensors,
            (),
            {
                **given,
                "use_cache": past is not None,
                "return_dict": True,
                **({} if past is None else {self._cache_name: past}),
            },
        )
        state: torch.Tensor = output.last_hidden_state
        projection = shared.get(f"{PROJECTION}_weight")
        self.state = state if projection is None else state @ projection.to(state.dtype).T

    def _past(self, inputs: Mapping[str, Any], name: str) -> Any:
        """The backbone's cache for this pass: what lies beside the model's, a new one, or None where the pass
        keeps none.
        """
        cache = next((inputs[key] for key in CACHES if inputs.get(key) is not None), None)
        use = inputs.get("use_cache")
        use = bool(getattr(self._trunk.config, "use_cache", False)) if use is None else bool(use)
        held = getattr(cache, _RUN, None)
        if cache is not None and not isinstance(cache, DynamicCache):
            raise Unsupported(
                "the state of this adapter needs a cache that grows",
                where=name,
                expected=DynamicCache.__name__,
                found=type(cache).__name__,
            )
        if cache is not None and cache.get_seq_length() and (held is None or held[0] != name):
            raise Unsupported(
                "this cache was filled without the adapter's second model, whose own is missing",
                where=name,
                remedy="begin with an empty cache",
            )
        if held is not None and held[0] == name:
            return held[1]
        if not self._cache_name or not (use or cache is not None):
            return None
        return DynamicCache(config=self._backbones[name].config)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Ends the state, and lets the cache that the model gives carry the backbone's: its layers, too, are
        reordered and cut with it.
        """
        past, self._cache, name = self._cache, None, self._active()
        self.state = None
        values = output if isinstance(output, tuple) else tuple(getattr(output, "values", tuple)())
        cache = next((value for value in values if isinstance(value, Cache)), None)
        if past is not None and cache is not None and getattr(cache, _RUN, (None, None))[1] is not past:
            setattr(cache, _RUN, (name, past))
            cache.layers.extend(past.layers)

    def _active(self) -> str:
        return next(
            (
                name
                for name, layers in reversed(self._layers.items())
                if any(name in layer._active for layer in layers)
            ),
            "",
        )


def _move_tables(backbone: nn.Module, device: torch.device) -> None:
    """Puts what a backbone has of its own, such as tables of positions, where the adapter's tensors are."""
    for module in backbone.modules():
        for name, value in module._buffers.items():
            if value is not None and not value.is_meta and value.device != device:
                module._buffers[name] = value.to(device)


def run_of(trunk: PreTrainedModel) -> Run:
    """The run of a model; its first adapter makes it."""
    run: Run | None = trunk.__dict__.get(_RUN)
    if run is None:
        run = Run(trunk)
        object.__setattr__(trunk, _RUN, run)
    return run


def _fitting(trunk: PreTrainedModel, layer: ShadowedLayer, name: str) -> nn.Module:
    """The backbone of an adapter, without its parameters."""
    cfg = layer._held[name].config
    found = {key: tuple(value.shape) for key, value in layer._shared(name).items()}
    wanted = shapes_of(trunk, cfg, layer._site.out_features, len(found))
    for key in sorted(
        wanted.keys() | {key for key in found if key.startswith((f"{BACKBONE}_", f"{PROJECTION}_"))}
    ):
        if wanted.get(key) != found.get(key):
            raise BaseMismatch(
                "the second model of this adapter does not mirror this one",
                where=f"{name}, {key.replace('/', '.')}",
                expected=wanted.get(key),
                found=found.get(key),
                remedy="use the base that the adapter was made for",
            )
    return built(trunk, cfg)


def trunk_at(model: nn.Module, path: str) -> PreTrainedModel:
    """The model whose list of layers holds the one at ``path``.

    Raises:
        Unsupported: it is no decoder of transformers with hidden states as wide as the layer's.
    """
    owner = path.rpartition(".")[0].rpartition(".")[0]
    trunk = innermost(module_at(model, owner)) if path.rpartition(".")[2].isdigit() else None
    if (
        not isinstance(trunk, PreTrainedModel)
        or "input_ids" not in inspect.signature(type(trunk).forward).parameters
    ):
        raise Unsupported(
            "a second model can mirror a decoder of transformers, and this layer belongs to none",
            where=path,
            expected="a layer in the list of its layers, such as model.layers.0",
            found=type(trunk).__name__,
            remedy="name whole layers in targets, or say all-layers",
        )
    return trunk


def select_layers(
    model: nn.Module, targets: str | tuple[str, ...], traits: Traits, exclude: tuple[str, ...] = ()
) -> list[Site]:
    """The layers that ``targets`` names, in the model's order.

    Raises:
        SiteNotFound: a name matches nothing.
        Unsupported: it is no layer of a decoder, or they belong to several.
    """
    sites: list[Site] = [_site(model, site.path) for site in select_blocks(model, targets, traits, exclude)]
    trunks = {trunk_at(model, site.path) for site in sites}
    if len(trunks) > 1:
        raise Unsupported(
            "the layers of one shadow state belong to one model",
            found=", ".join(type(trunk).__name__ for trunk in trunks),
            remedy="name the layers of one of them in targets",
        )
    return sites


def _site(model: nn.Module, path: str) -> ShadowSite:
    trunk, width = trunk_at(model, path), block_at(model, path, module_at(model, path)).out_features
    return ShadowSite(path, width, width, "layer", draw=partial(drawn, trunk, width))


def around_layer(model: nn.Module, module: nn.Module, path: str, traits: Traits) -> ShadowedLayer:
    """The holder of a layer's adapters."""
    return ShadowedLayer(module, _site(model, path), trunk_at(model, path))


def with_tensors(model: nn.Module, config: Any) -> Any:
    """The config with the names and shapes of the backbone that mirrors this model.

    Raises:
        Unsupported: the config asks for the auxiliary loss.
    """
    if config.auxiliary_loss_weight:
        raise Unsupported(
            "the auxiliary loss, of what the second model predicts by itself, is not computed here",
            where="auxiliary_loss_weight",
            found=config.auxiliary_loss_weight,
            expected=0,
            remedy="leave it out, or train with PEFT",
        )
    site = select_layers(model, config.targets, TRAITS)[0]
    shapes = shapes_of(trunk_at(model, site.path), config, site.out_features)
    return dataclasses.replace(config, tensors=tuple(sorted(shapes.items())))


shadow = Kind("shadow", select_layers, ShadowedLayer, around_layer, ready=with_tensors, outermost=True)
