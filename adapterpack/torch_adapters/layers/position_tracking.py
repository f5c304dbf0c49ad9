"""Tells an adapter that acts at some token positions only where these are in the current forward pass.

Layers see hidden states, not tokens. So hooks on the model's trunk read the token ids, mask, labels and cache
of each pass, and layers ask :meth:`Acting.mask`. Which rows an adapter has already acted in is stored on the
KV cache, for the passes that continue it; with gradient checkpointing, the pass is kept for the backward
pass, in which layers run again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ...adapter_methods import LAYOUTS, Acts
from ...adapter_methods.core.token_positions import has_acted
from ...errors import Unsupported
from .calls import Args, Kwargs, argument_names, named_arguments
from .layer import Adapted
from .observers import Observer, observe
from .prompts import CACHES, runs_layers_again, trunk_of

_ACTED = "_adapterpack_acting"
"""The attribute of a cache that records in which rows each adapter has acted."""
_IGNORED = -100


class Pass:
    """One forward pass of the trunk with an adapter that acts where ``acts`` says."""

    def __init__(self, name: str, acts: Acts, inputs: Mapping[str, Any], labels: Any) -> None:
        self.name = name
        self.acts = acts
        self.labels = labels
        self.ids: Tensor | None = inputs.get("input_ids")
        self.padding = inputs.get("attention_mask")
        self.cache = next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)
        self.past = 0 if self.cache is None else int(self.cache.get_seq_length())
        self.found: Tensor | None = None
        self.before: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """Where the adapter acts, ``[batch, length]`` bool, found when a layer first asks."""
        # torch.compile cannot trace the lock of a cached property
        if self.found is None:
            if self.ids is None:
                raise Unsupported(
                    "token ids say where this adapter acts, and this pass has none",
                    where=self.name,
                    remedy="give input_ids instead of inputs_embeds",
                )
            self.before, real = self._acted_before(self.ids), self._real(self.ids)
            self.found = self.acts.mask(self.ids, real, real & self._unlearnt(self.ids), self.before)
        return self.found

    def _acted_before(self, ids: Tensor) -> Tensor | None:
        """Returns in which rows the adapter has acted in earlier passes with this cache, ``[batch]`` bool;
        None without a cache.
        """
        if not self.past:
            return None
        earlier = getattr(self.cache, _ACTED, {}).get(self.name)
        if earlier is None and not self.acts.joins:
            raise Unsupported(
                "this cache was filled without the adapter, which would have acted in what it holds",
                where=self.name,
                remedy="begin with an empty cache",
            )
        if earlier is None:
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        if len(earlier) != len(ids):
            raise Unsupported(
                "this cache has been given other rows than those that it was filled with",
                where=self.name,
                expected=len(earlier),
                found=len(ids),
                remedy="begin with an empty cache",
            )
        return earlier

    def _real(self, ids: Tensor) -> Tensor:
        """Returns which of the pass's tokens are not padding, ``[batch, length]`` bool."""
        if self.padding is None:
            return torch.ones_like(ids, dtype=torch.bool)
        length = ids.shape[1]
        if not isinstance(self.padding, Tensor) or self.padding.ndim != 2 or self.padding.shape[1] < length:
            raise Unsupported(
                "this attention mask does not say which tokens are padding",
                where=self.name,
                expected=(len(ids), self.past + length),
                found=tuple(getattr(self.padding, "shape", ())) or type(self.padding).__name__,
                remedy="give a mask [batch, tokens], those in the cache too",
            )
        return self.padding[:, -length:].bool()

    def _unlearnt(self, ids: Tensor) -> Tensor:
        """Returns which tokens come before the first label of their row, the prompt in training; all of them
        without labels.
        """
        if not isinstance(self.labels, Tensor) or self.labels.shape != ids.shape:
            return torch.ones_like(ids, dtype=torch.bool)
        return (self.labels != _IGNORED).long().cumsum(1) == 0


class Acting(Observer):
    """Follows the passes of a model with an adapter that acts at some positions only."""

    def __init__(self, model: nn.Module, name: str, acts: Acts) -> None:
        trunk = _tracked(model)
        self.name, self.acts = name, acts
        self.run: Pass | None = None
        self.labels: Any = None
        self.handles = [
            trunk.register_forward_pre_hook(self._enter, with_kwargs=True),
            trunk.register_forward_hook(self._leave, always_call=True),
        ]
        if trunk is not model:
            self.handles.append(model.register_forward_pre_hook(self._see_labels, with_kwargs=True))

    def mask(self) -> Tensor:
        """Returns where the adapter acts in the current pass, ``[batch, length]`` bool.

        Raises:
            Unsupported: the model is not running, or the pass has no token ids.
        """
        if self.run is None:
            raise Unsupported(
                "where this adapter acts is known in a pass of the whole model only",
                where=self.name,
                remedy="call the model, on input_ids",
            )
        return self.run.mask

    def _see_labels(self, model: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Keeps the labels of a call of the whole model: the trunk does not get them."""
        self.labels = kwargs.get("labels")

    def _enter(self, trunk: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Begins a pass."""
        self.run = Pass(self.name, self.acts, named_arguments(trunk, args, kwargs), self.labels)
        self.labels = None

    def _leave(self, trunk: nn.Module, args: Args, output: Any) -> None:
        """Ends a pass: records on its cache where the adapter has acted."""
        run = self.run
        self.run = None
        if run is None or output is None:  # the pass failed
            return
        parts = output if isinstance(output, tuple) else (output,)
        parts = tuple(output.values()) if isinstance(output, Mapping) else parts
        for cache in (part for part in parts if isinstance(part, Cache)):
            if run.found is not None:  # a layer has asked for it
                done = {self.name: has_acted(run.found, run.before)}
                setattr(cache, _ACTED, {**getattr(cache, _ACTED, {}), **done})
        if not runs_layers_again(trunk):
            return
        self.run = run
        first = next((part for part in parts if isinstance(part, Tensor) and part.requires_grad), None)
        # Gradient checkpointing runs layers again in the backward pass, by which time another pass may have
        # begun. Restore this pass when the gradient of its output arrives.
        if first is not None:
            first.register_hook(partial(self._resume, run))

    def _resume(self, run: Pass, gradient: Tensor) -> None:
        """Makes ``run`` the current pass again."""
        self.run = run


def _tracked(model: nn.Module) -> nn.Module:
    """Returns the part of a model that takes the token ids: a transformers model without its heads, or the
    model itself.

    Raises:
        Unsupported: the model takes no token ids, or two of its parts do.
    """
    if isinstance(model, PreTrainedModel) and model.config.is_encoder_decoder:
        raise Unsupported(
            "an adapter that acts at some positions only has no rule for an encoder and a decoder",
            found=type(model).__name__,
        )
    trunk = trunk_of(model) if isinstance(model, PreTrainedModel) else model
    if "input_ids" not in argument_names(trunk):
        raise Unsupported(
            "an adapter that acts at some positions only needs a model that takes token ids",
            found=type(model).__name__,
            expected="input_ids",
        )
    return trunk


def tell(model: nn.Module, name: str, wrappers: Sequence[Adapted]) -> None:
    """Connects the wrappers of an adapter whose config restricts where it acts to these positions.

    Raises:
        Unsupported: the model takes no token ids, a site has no token positions, or the sites' positions
            differ.
    """
    rules = {wrapper._held[name].config.acts for wrapper in wrappers}
    if len(rules) > 1:
        raise Unsupported(
            "the sites of an adapter must act at the same positions",
            where=name,
            found="; ".join(map(str, rules)),
        )
    for wrapper in wrappers:
        kind = wrapper._site.kind
        if kind not in {"block", "attention"} and not (kind in LAYOUTS and LAYOUTS[kind].linear):
            raise Unsupported(
                "an adapter that acts at some positions only needs a linear layer",
                where=wrapper._site.path,
                found=kind,
            )
    acting = Acting(model, name, rules.pop())
    observe(model, name, acting)
    for wrapper in wrappers:
        wrapper._held[name].where = acting.mask
