"""Runs adapters that need whole sequences: refuses a cache, and makes the first pass of the base that weights their layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...errors import Unsupported
from .layer import Adapted
from .wrapper import Wrapper, path_order

_CACHES = ("past_key_values", "cache", "past_key_value")
_ATTRIBUTE = "_adapterpack_first_passes"
"""The attribute of a model that holds the handles of the hooks, by adapter."""
Weigh = Callable[[Any, torch.Tensor, int, int], dict[str, torch.Tensor]]


def lead(model: nn.Module, name: str, weigh: Weigh | None) -> None:
    """Lets every call of ``model`` with the adapter active refuse a cache, and begin with a pass of the base alone, without gradients.

    ``weigh`` makes of the adapter's shared parameters, the last hidden states, the number of a layer and that of all layers what that
    layer gets in addition to its own parameters; without it there is no such pass.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        order = path_order(model)
        layers = [module for module in model.modules() if isinstance(module, Adapted) and name in module._names]
        layers.sort(key=lambda layer: order[layer._site.path])
        if not any(name in layer._active for layer in layers):
            return
        _refuse_cache(kwargs, name)
        if weigh is None:
            return
        hidden = _hidden(model, args, kwargs, name)
        for number, layer in enumerate(layers):
            shared = layer._shared(name)
            first_shared = next(iter(shared.values()))
            layer._first_pass_params[name] = weigh(shared, hidden.to(first_shared.dtype), number, len(layers))

    def after(module: nn.Module, *_: Any) -> None:
        if not module.training:  # activation checkpointing computes layers again when the pass is over
            for layer in model.modules():
                if isinstance(layer, Adapted):
                    layer._first_pass_params.pop(name, None)

    handles = (model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after, always_call=True))
    handles_by_adapter = getattr(model, _ATTRIBUTE, {})
    object.__setattr__(model, _ATTRIBUTE, {**handles_by_adapter, name: handles})


def release(model: nn.Module, name: str) -> None:
    """Takes the hooks of an adapter away again; of one that has none, nothing."""
    for handle in getattr(model, _ATTRIBUTE, {}).pop(name, ()):
        handle.remove()


def _refuse_cache(kwargs: Mapping[str, Any], name: str) -> None:
    for cache in _CACHES:
        passed = kwargs.get(cache)
        if passed is not None and not (hasattr(passed, "get_seq_length") and passed.get_seq_length() == 0):
            raise Unsupported("this adapter must see all tokens at once, and a cache holds some of them", where=name, found=cache,
                              remedy="call the model with use_cache=False")


def _hidden(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> torch.Tensor:
    """The last hidden states ``[batch, positions, width]`` of the base."""
    inputs = {key: value for key, value in kwargs.items() if key not in {"labels", *_CACHES}}
    with torch.no_grad(), _bare(model):
        output = model.forward(*args, **{**inputs, "output_hidden_states": True, "return_dict": True, **_no_cache(model)})
    states = getattr(output, "hidden_states", None)
    if not states:
        raise Unsupported("this adapter needs the hidden states of the model, which it does not give", where=name,
                          found=type(model).__name__)
    last: torch.Tensor = states[-1]
    return last


def _no_cache(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


@contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """Switches all adapters off inside the block."""
    wrappers = [module for module in model.modules() if isinstance(module, Wrapper)]
    before = [wrapper._active for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper._active = ()
        yield
    finally:
        for wrapper, active in zip(wrappers, before, strict=True):
            wrapper._active = active
