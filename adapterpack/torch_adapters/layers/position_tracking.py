"""Tells adapters that act at some token positions only where these are in the current forward pass.

Layers see hidden states, not tokens. So hooks on the model's trunk read the token ids, mask, labels and cache
of each pass, and layers ask :meth:`Acting.mask`. Which rows an adapter has already acted in is stored on the
KV cache, for the passes that continue it; with gradient checkpointing, the pass is kept for the backward
pass, in which layers run again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from ...adapter_methods import LAYOUTS
from ...adapter_methods.core.token_positions import Acts, has_acted
from ...errors import Unsupported
from .layer import Adapted

_ATTRIBUTE = "_adapterpack_acting"
"""The attribute of a trunk that holds its :class:`Acting`, and the attribute of a cache that records in which
rows each adapter has acted.
"""
_CACHES = ("cache", "past_key_values")
_IGNORED = -100


class Pass:
    """One forward pass of the trunk; ``masks`` is filled as layers ask."""

    def __init__(self, inputs: Mapping[str, Any], labels: Any) -> None:
        self.ids: torch.Tensor | None = inputs.get("input_ids")
        self.padding = inputs.get("attention_mask")
        self.labels = labels
        self.cache = next((inputs[name] for name in _CACHES if inputs.get(name) is not None), None)
        self.past = 0 if self.cache is None else int(self.cache.get_seq_length())
        self.masks: dict[str, torch.Tensor] = {}
        self.before: dict[str, torch.Tensor | None] = {}

    def mask(self, name: str, acts: Acts) -> torch.Tensor:
        """Returns where the adapter acts, ``[batch, length]`` bool."""
        if name not in self.masks:
            if self.ids is None:
                raise Unsupported(
                    "token ids say where this adapter acts, and this pass has none",
                    where=name,
                    remedy="give input_ids instead of inputs_embeds",
                )
            self.before[name] = self._before(name, acts)
            real = self._real(name)
            self.masks[name] = acts.mask(self.ids, real, real & self._unlearnt(), self.before[name])
        return self.masks[name]

    def _before(self, name: str, acts: Acts) -> torch.Tensor | None:
        """Returns in which rows the adapter has acted in earlier passes with this cache, ``[batch]`` bool;
        None without a cache.
        """
        if not self.past:
            return None
        earlier: torch.Tensor | None = getattr(self.cache, _ATTRIBUTE, {}).get(name)
        if earlier is None and not acts.joins:
            raise Unsupported(
                "this cache was filled without the adapter, which would have acted in what it holds",
                where=name,
                remedy="begin with an empty cache",
            )
        assert self.ids is not None
        if earlier is not None and len(earlier) != len(self.ids):
            raise Unsupported(
                "this cache has been given other rows than those that it was filled with",
                where=name,
                expected=len(earlier),
                found=len(self.ids),
                remedy="begin with an empty cache",
            )
        return (
            torch.zeros(len(self.ids), dtype=torch.bool, device=self.ids.device)
            if earlier is None
            else earlier
        )

    def _real(self, name: str) -> torch.Tensor:
        """Returns which of the pass's tokens are not padding, ``[batch, length]`` bool."""
        assert self.ids is not None
        if self.padding is None:
            return torch.ones_like(self.ids, dtype=torch.bool)
        wanted = (self.ids.shape[0], self.past + self.ids.shape[1])
        if (
            not isinstance(self.padding, torch.Tensor)
            or self.padding.ndim != 2
            or self.padding.shape[1] < self.ids.shape[1]
        ):
            raise Unsupported(
                "this attention mask does not say which tokens are padding",
                where=name,
                expected=wanted,
                found=tuple(getattr(self.padding, "shape", ())) or type(self.padding).__name__,
                remedy="give a mask [batch, tokens], those in the cache too",
            )
        return self.padding[:, -self.ids.shape[1] :].bool()

    def _unlearnt(self) -> torch.Tensor:
        """Returns which tokens come before the first label of their row, the prompt in training; all of them
        without labels.
        """
        assert self.ids is not None
        if not isinstance(self.labels, torch.Tensor) or self.labels.shape != self.ids.shape:
            return torch.ones_like(self.ids, dtype=torch.bool)
        return (self.labels != _IGNORED).long().cumsum(1) == 0


class Acting:
    """The positions at which a model's adapters act, by adapter name, and the pass that is running."""

    def __init__(self, model: nn.Module) -> None:
        trunk = trunk_of(model)
        self.rules: dict[str, Acts] = {}
        self.takes = tuple(inspect.signature(type(trunk).forward).parameters)[1:]
        self.run: Pass | None = None
        self.labels: Any = None
        self.handles = [
            trunk.register_forward_pre_hook(self._enter, with_kwargs=True),
            trunk.register_forward_hook(self._leave, always_call=True),
        ]
        if trunk is not model:
            self.handles.append(model.register_forward_pre_hook(self._see_labels, with_kwargs=True))

    def mask(self, name: str) -> torch.Tensor:
        """Returns where the adapter acts in the current pass, ``[batch, length]`` bool.

        Raises:
            Unsupported: the model is not running, or the pass has no token ids.
        """
        if self.run is None:
            raise Unsupported(
                "where this adapter acts is known in a pass of the whole model only",
                where=name,
                remedy="call the model, on input_ids",
            )
        return self.run.mask(name, self.rules[name])

    def _see_labels(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps the labels of a call of the whole model: the trunk does not get them."""
        self.labels = kwargs.get("labels")

    def _enter(self, trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begins a pass."""
        self.run = Pass({**dict(zip(self.takes, args, strict=False)), **kwargs}, self.labels)
        self.labels = None

    def _leave(self, trunk: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Ends a pass: records on its cache where adapters have acted."""
        run = self.run
        if run is None or output is None:  # the pass failed
            self.run = None
            return
        parts = (
            tuple(output.values())
            if isinstance(output, Mapping)
            else output
            if isinstance(output, tuple)
            else (output,)
        )
        for cache in (part for part in parts if isinstance(part, Cache)):
            done = {name: has_acted(mask, run.before[name]) for name, mask in run.masks.items()}
            setattr(cache, _ATTRIBUTE, {**getattr(cache, _ATTRIBUTE, {}), **done})
        again = any(getattr(module, "gradient_checkpointing", False) for module in trunk.modules())
        self.run = run if again else None
        first = next((part for part in parts if isinstance(part, torch.Tensor) and part.requires_grad), None)
        # Gradient checkpointing runs layers again in the backward pass, by which time another pass may have
        # begun. Restore this pass when the gradient of its output arrives.
        if again and first is not None:
            first.register_hook(partial(self._resume, run))

    def _resume(self, run: Pass, gradient: torch.Tensor) -> None:
        """Makes ``run`` the current pass again."""
        self.run = run


def trunk_of(model: nn.Module) -> nn.Module:
    """Returns the part of a model that takes the token ids: a transformers model without its heads, or the
    model itself.

    Raises:
        Unsupported: the model takes no token ids, or two of its parts do.
    """
    trunk = model
    if isinstance(model, PreTrainedModel):
        if model.config.is_encoder_decoder:
            raise Unsupported(
                "an adapter that acts at some positions only has no rule for an encoder and a decoder",
                found=type(model).__name__,
            )
        # OPT's heads call this decoder directly and bypass the base model's forward, where hooks would be.
        inner = getattr(model.base_model, "decoder", None)
        trunk = inner if isinstance(inner, PreTrainedModel) else model.base_model
    if "input_ids" not in inspect.signature(type(trunk).forward).parameters:
        raise Unsupported(
            "an adapter that acts at some positions only needs a model that takes token ids",
            found=type(model).__name__,
            expected="input_ids",
        )
    return trunk


def tell(model: nn.Module, name: str, wrappers: Iterable[Adapted]) -> None:
    """Connects the wrappers of an adapter to the positions where it acts, if its config restricts them.

    Raises:
        Unsupported: the model takes no token ids, a site has no token positions, or the sites' positions
            differ.
    """
    adapted = [wrapper for wrapper in wrappers if name in wrapper._methods]
    rules = {wrapper._methods[name][1].acts for wrapper in adapted}
    if rules <= {None}:
        return
    if len(rules) > 1:
        raise Unsupported(
            "the sites of an adapter must act at the same positions",
            where=name,
            found="; ".join(map(str, rules)),
        )
    for wrapper in adapted:
        kind = wrapper._site.kind
        if kind not in {"block", "attention"} and not (kind in LAYOUTS and LAYOUTS[kind].linear):
            raise Unsupported(
                "an adapter that acts at some positions only needs a linear layer",
                where=wrapper._site.path,
                found=kind,
            )
    trunk = trunk_of(model)
    acting: Acting | None = trunk.__dict__.get(_ATTRIBUTE)
    if acting is None:
        acting = trunk.__dict__[_ATTRIBUTE] = Acting(model)
    acting.rules[name] = rules.pop()
    for wrapper in adapted:
        wrapper._where[name] = partial(acting.mask, name)


def forget(model: nn.Module, names: Iterable[str]) -> None:
    """Drops adapters that were removed, and the hooks when none is left."""
    for module in list(model.modules()):
        acting: Acting | None = module.__dict__.get(_ATTRIBUTE)
        if acting is None:
            continue
        for name in names:
            acting.rules.pop(name, None)
        if not acting.rules:
            for handle in acting.handles:
                handle.remove()
            del module.__dict__[_ATTRIBUTE]
