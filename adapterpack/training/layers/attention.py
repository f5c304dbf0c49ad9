"""The module around a layer's attention that holds its prompts, which use the attention's own queries and projections."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ...adapter_methods import Site, Traits
from ...adapter_methods.forms.attention import TRAITS, attend
from ...errors import Unsupported
from ..block_targets import WORDS, select_blocks
from .layer import Adapted
from .weights import tensor_of
from .wrapper import innermost, module_at

_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")


class AdaptedAttention(Adapted):
    """An attention module with any number of named prompts, of which one is active at a time.

    Its queries are those that it has with whatever else is active; a prompt's keys and values, and its way out, are by the base's own
    projections, so that a prompt means the same in any company.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The attention's output with the active prompt attended to."""
        output = self._base(*args, **kwargs)
        if not self._active:
            return output
        hidden, _ = self._entered(args, kwargs)
        h = output[0] if isinstance(output, tuple) else output
        for name in self._active if self._rows is not None else self._active[-1:]:
            h = self._by_row(name, hidden, h, partial(self._changed, name, kwargs.get("position_embeddings")))
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def _changed(self, name: str, places: Any, hidden: torch.Tensor, h: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        """The output ``h`` with a prompt attended to; ``index`` are the rows of the batch that ``hidden`` and ``h`` hold."""
        if index is not None and places is not None:  # one for all rows, or one for each
            places = tuple(place if len(place) == 1 else place[index] for place in places)
        return h + self._weights.get(name, 1.0) * self._added(name, hidden, places).to(h.dtype)

    def _added(self, name: str, hidden: torch.Tensor, places: Any) -> torch.Tensor:
        method, cfg = self._methods[name]
        attention = innermost(self)
        queries = _queries(attention, hidden, places)
        dtype = torch.promote_types(queries.dtype, torch.float32)  # the softmax wants it
        form = method.normal_form(cfg, self._tensors(name, dtype), self._site)
        keys, values = (self._heads(leaf, form.prompt, hidden.dtype) for leaf in ("k_proj", "v_proj"))
        keys = _normed(attention, "k_norm", keys)
        scale = float(getattr(attention, "scaling", None) or queries.shape[-1] ** -0.5)
        keys, values = (heads[0].transpose(0, 1).to(dtype) for heads in (keys, values))
        added = attend(form, queries.to(dtype), keys, values, scale)
        out = innermost(module_at(attention, "o_proj"))
        y: torch.Tensor = out(added.to(hidden.dtype))
        bias = tensor_of(out, "bias", self._site.path)
        return y if bias is None else y - bias  # the layer's own output has it

    def _heads(self, leaf: str, prompt: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``[1, n, heads, head_dim]`` of the prompt by one of the base's projections."""
        attention = innermost(self)
        made: torch.Tensor = innermost(module_at(attention, leaf))(prompt.to(dtype)[None])
        return made.unflatten(-1, (-1, attention.head_dim))  # type: ignore[arg-type]


def _queries(attention: nn.Module, hidden: torch.Tensor, places: Any) -> torch.Tensor:
    """The queries ``[batch, heads, length, head_dim]`` as the attention uses them, turned by their positions in the model's own way."""
    made = attention.q_proj(hidden).unflatten(-1, (-1, attention.head_dim))  # type: ignore[operator, arg-type]
    queries = _normed(attention, "q_norm", made).transpose(1, 2)
    if places is None:
        return queries
    turned: torch.Tensor = _rotation(attention)(queries, queries, *places)[0]
    return turned


def _normed(attention: nn.Module, leaf: str, heads: torch.Tensor) -> torch.Tensor:
    norm: Any = getattr(attention, leaf, None)
    return heads if norm is None else norm(heads)


def _rotation(attention: nn.Module) -> Callable[..., Any]:
    """The function by which the module that defines this attention turns queries and keys."""
    function = getattr(inspect.getmodule(type(attention)), "apply_rotary_pos_emb", None)
    if function is None:
        raise Unsupported("it is not known how this attention turns its queries by their positions", found=type(attention).__name__)
    return function  # type: ignore[no-any-return]


def select_attention(model: nn.Module, targets: str | tuple[str, ...], traits: Traits, exclude: tuple[str, ...] = ()) -> list[Site]:
    """The attention modules that ``targets`` names, in the model's order.

    Raises:
        SiteNotFound: a name matches nothing.
        Unsupported: a module is no attention of queries, keys and values by linear layers of its own.
    """
    return [_site(model, site.path) for site in select_blocks(model, targets, traits, exclude)]


def _site(model: nn.Module, path: str) -> Site:
    """The site of an attention module, as wide as what its projections read."""
    attention = innermost(module_at(model, path))
    parts = {leaf: innermost(getattr(attention, leaf)) for leaf in _PARTS if isinstance(getattr(attention, leaf, None), nn.Module)}
    width, queries, keys = (getattr(parts.get(leaf), side, 0) for leaf, side in (("k_proj", "in_features"), ("q_proj", "out_features"),
                                                                                  ("k_proj", "out_features")))
    norms = [getattr(attention, leaf).weight.shape for leaf in ("q_norm", "k_norm") if hasattr(getattr(attention, leaf, None), "weight")]
    head_dim = getattr(attention, "head_dim", None)
    plain = len(parts) == len(_PARTS) and isinstance(head_dim, int) and keys and queries == parts["o_proj"].in_features
    if not plain or head_dim is None or keys % head_dim or queries % keys or any(tuple(shape) != (head_dim,) for shape in norms):
        raise Unsupported("a prompt cannot be added to this kind of attention", where=path, found=type(attention).__name__,
                          expected=f"head_dim, and linear layers {', '.join(_PARTS)}", remedy="use prefix_tuning")
    return Site(path, width, width, "attention")


def around_attention(model: nn.Module, module: nn.Module, path: str, traits: Traits) -> AdaptedAttention:
    """The holder of an attention's prompts."""
    return AdaptedAttention(module, _site(model, path))


def last_layers(model: nn.Module, config: Any) -> Any:
    """The config with its targets named: the attentions of the model's last layers.

    Raises:
        Unsupported: the model has fewer layers than the config names.
    """
    if not isinstance(config.targets, str) or config.targets not in WORDS:
        return dataclasses.replace(config, adapter_layers=0)
    paths = tuple(site.path for site in select_blocks(model, config.targets, TRAITS))
    count = config.adapter_layers or len(paths)
    if count > len(paths):
        raise Unsupported("the model has fewer layers than are to be adapted", where="adapter_layers", expected=f"at most {len(paths)}",
                          found=count)
    return dataclasses.replace(config, targets=paths[-count:], adapter_layers=count)
