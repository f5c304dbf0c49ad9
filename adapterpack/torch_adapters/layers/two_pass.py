"""Runs adapters that must see whole sequences: refuses a KV cache, passes on padding masks, and, where the
method needs it, runs the base once before each call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...adapter_methods.core.routers import MASKS
from ...errors import Unsupported
from .active import adapted_layers, wrappers_of
from .calls import Args, Kwargs, named_arguments
from .layer import Adapted
from .observers import Observer
from .wrapper import module_at, path_order

_CACHES = ("past_key_values", "cache", "past_key_value")


class Lead(Observer):
    """Makes every call of a model with the adapter active refuse a cache, passes padding masks to the
    adapter's layers, and, if its method has a ``first_pass``, runs the base alone first, without gradients.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        order = path_order(model)
        self.layers = sorted(adapted_layers(model, name), key=lambda layer: order[layer._site.path])
        self.handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]
        parts: dict[nn.Module, list[Adapted]] = {}
        for layer in self.layers:
            parts.setdefault(_part_of(model, layer._site.path), []).append(layer)
        self.handles += [
            part.register_forward_pre_hook(partial(self._mask, inside), with_kwargs=True)
            for part, inside in parts.items()
        ]

    def _before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Refuses a cache before each call; if the method has a first pass, runs the base and gives each
        layer what the method makes of its hidden states.
        """
        if not any(self.name in layer._active for layer in self.layers):
            return
        _refuse_cache(kwargs, self.name)
        weigh = self.layers[0]._held[self.name].method.overrides.get("first_pass")
        if weigh is None:
            return
        hidden = _hidden(self.model, args, kwargs, self.name)
        for number, layer in enumerate(self.layers):
            shared = layer._shared(self.name)
            first_shared = next(iter(shared.values()))
            params = weigh(shared, hidden.to(first_shared.dtype), number, len(self.layers))
            layer._held[self.name].first_pass = params

    def _mask(self, layers: list[Adapted], part: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Passes the padding masks that a part of the model takes on to the adapter's layers inside it."""
        if not any(self.name in layer._active for layer in layers):
            return
        given = named_arguments(part, args, kwargs)
        values = (given.get(key) for key in ("attention_mask", "encoder_attention_mask"))
        masks = {
            key: value.bool()
            for key, value in zip(MASKS, values, strict=True)
            if isinstance(value, Tensor) and value.ndim == 2
        }
        for layer in layers:
            held = layer._held[self.name]
            before = {key: value for key, value in held.first_pass.items() if key not in MASKS}
            held.first_pass = {**before, **masks}

    def _after(self, module: nn.Module, *_: Any) -> None:
        """Drops what the first pass gave the layers; not in training, where activation checkpointing runs
        layers again after the call.
        """
        # In training, activation checkpointing runs layers again after the call, so keep the results.
        if not module.training:
            for layer in self.layers:
                layer._held[self.name].first_pass = {}


def _part_of(model: nn.Module, path: str) -> nn.Module:
    """Returns the innermost transformers model that contains the layer at ``path``, such as one tower."""
    owners = (path.split(".")[:end] for end in range(path.count("."), 0, -1))
    parts = (module_at(model, ".".join(owner)) for owner in owners)
    return next((part for part in parts if isinstance(part, PreTrainedModel)), model)


def _refuse_cache(kwargs: Kwargs, name: str) -> None:
    """Raises if a call passes a cache that already holds tokens."""
    for cache in _CACHES:
        passed = kwargs.get(cache)
        if passed is not None and not (hasattr(passed, "get_seq_length") and passed.get_seq_length() == 0):
            raise Unsupported(
                "this adapter must see all tokens at once, and a cache holds some of them",
                where=name,
                found=cache,
                remedy="call the model with use_cache=False",
            )


def _hidden(model: nn.Module, args: Args, kwargs: Kwargs, name: str) -> Tensor:
    """Returns the base's last hidden states ``[batch, positions, width]`` for the inputs of a call."""
    inputs = {key: value for key, value in kwargs.items() if key not in {"labels", *_CACHES}}
    with torch.no_grad(), _bare(model):
        output = model.forward(
            *args,
            **{
                **inputs,
                "output_hidden_states": True,
                "return_dict": True,
                **({"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}),
            },
        )
    states = getattr(output, "hidden_states", None)
    if not states:
        raise Unsupported(
            "this adapter needs the hidden states of the model, which it does not give",
            where=name,
            found=type(model).__name__,
        )
    return states[-1]


@contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """Deactivates all adapters inside the block: in one walk over the model, as this runs in every call."""
    before = [(module, module._active) for module in wrappers_of(model)]
    try:
        for module, _ in before:
            module._active = ()
        yield
    finally:
        for module, names in before:
            module._active = names
