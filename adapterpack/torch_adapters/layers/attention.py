"""The module around a layer's attention that holds its prompts, which use the attention's own queries and
projections.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ...adapter_methods import Site, Traits
from ...adapter_methods.forms.attention import TRAITS, attend
from ...errors import Unsupported
from .block_targets import WORDS, select_blocks
from .layer import Adapted
from .weights import tensor_of
from .wrapper import innermost, module_at


class Projections(NamedTuple):
    """How an attention makes queries, keys and values: by the layers ``parts``, of which the first gives all
    three in this order where ``joined``. What the heads give of a prompt goes ``out`` through that layer, or
    as it is where there is none.
    """

    parts: tuple[str, ...]
    joined: bool
    out: str | None

    def queries(self, attention: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The queries of the input, ``[batch, length, heads * head_dim]``, with whatever is active in the
        attention.
        """
        made: torch.Tensor = getattr(attention, self.parts[0])(hidden)
        return made.chunk(3, dim=-1)[0] if self.joined else made

    def keys_and_values(
        self, attention: nn.Module, prompt: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of a prompt ``[n, width]`` by the base's own layers, ``[1, n, heads * head_dim]`` each."""
        if self.joined:
            _, keys, values = innermost(module_at(attention, self.parts[0]))(prompt[None]).chunk(3, dim=-1)
        else:
            keys, values = (innermost(module_at(attention, leaf))(prompt[None]) for leaf in self.parts[1:3])
        return keys, values

    def widths(self, attention: nn.Module) -> tuple[int, int, int] | None:
        """The widths of the attention's input, its queries and its keys; None where it has not these layers,
        or others besides.
        """
        layers = [
            innermost(getattr(attention, leaf))
            for leaf in self.parts
            if isinstance(getattr(attention, leaf, None), nn.Module)
        ]
        if len(layers) < len(self.parts):
            return None
        if self.joined:
            width, made, back = (
                getattr(layers[place], name, 0) for place, name in ((0, "nx"), (0, "nf"), (1, "nx"))
            )
            return (width, back, back) if made == 3 * back and back else None
        width, queries, keys, back = (
            getattr(layers[place], name, 0)
            for place, name in (
                (1, "in_features"),
                (0, "out_features"),
                (1, "out_features"),
                (3, "in_features"),
            )
        )
        return (width, queries, keys) if queries == back else None


_PROJECTIONS = (
    Projections(("q_proj", "k_proj", "v_proj", "o_proj"), False, "o_proj"),
    Projections(("c_attn", "c_proj"), True, None),
)
"""Llama's and its relatives'; GPT-2's, where PEFT leaves out the output projection, and so do we."""


def _projections(attention: nn.Module) -> Projections | None:
    return next((one for one in _PROJECTIONS if one.widths(attention) is not None), None)


class AdaptedAttention(Adapted):
    """An attention module with any number of named prompts, of which one is active at a time.

    Its queries are those that it has with whatever else is active; a prompt's keys and values, and its way
    out, are by the base's own projections, so that a prompt means the same in any company.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The attention's output with the active prompt attended to."""
        output = self._base(*args, **kwargs)
        if not self._active:
            return output
        hidden, _ = self._enter(args, kwargs)
        h = output[0] if isinstance(output, tuple) else output
        for name in self._active if self._rows is not None else self._active[-1:]:
            h = self._by_row(name, hidden, h, partial(self._changed, name, kwargs.get("position_embeddings")))
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def _changed(
        self, name: str, places: Any, hidden: torch.Tensor, h: torch.Tensor, index: torch.Tensor | None
    ) -> torch.Tensor:
        """The output ``h`` with a prompt attended to; ``index`` are the rows of the batch that ``hidden`` and
        ``h`` hold.
        """
        if index is not None and places is not None:  # one for all rows, or one for each
            places = tuple(place if len(place) == 1 else place[index] for place in places)
        return h + self._weights.get(name, 1.0) * self._added(name, hidden, places).to(h.dtype)

    def _added(self, name: str, hidden: torch.Tensor, places: Any) -> torch.Tensor:
        method, cfg = self._methods[name]
        attention = innermost(self)
        projections = _projections(attention)
        assert projections is not None
        queries = _queries(attention, projections.queries(attention, hidden), places)
        dtype = torch.promote_types(queries.dtype, torch.float32)  # the softmax wants it
        form = method.normal_form(cfg, self._tensors(name, dtype), self._site)
        made = projections.keys_and_values(attention, form.prompt.to(hidden.dtype))
        shape: Any = (-1, attention.head_dim)
        keys, values = (heads.unflatten(-1, shape) for heads in made)
        keys = _normalize(attention, "k_norm", keys)
        scale = float(getattr(attention, "scaling", None) or queries.shape[-1] ** -0.5)
        keys, values = (heads[0].transpose(0, 1).to(dtype) for heads in (keys, values))
        added = attend(form, queries.to(dtype), keys, values, scale).to(hidden.dtype)
        if projections.out is None:
            return added
        out = innermost(module_at(attention, projections.out))
        y: torch.Tensor = out(added)
        bias = tensor_of(out, "bias", self._site.path)
        return y if bias is None else y - bias  # the layer's own output has it


def _queries(attention: nn.Module, made: torch.Tensor, places: Any) -> torch.Tensor:
    """The queries ``made`` as the attention uses them, ``[batch, heads, length, head_dim]``, turned by
    positions in the model's own way.
    """
    made = made.unflatten(-1, (-1, attention.head_dim))  # type: ignore[arg-type]
    queries = _normalize(attention, "q_norm", made).transpose(1, 2)
    if places is None:
        return queries
    turned: torch.Tensor = _rotation(attention)(queries, queries, *places)[0]
    return turned


def _normalize(attention: nn.Module, leaf: str, heads: torch.Tensor) -> torch.Tensor:
    norm: Any = getattr(attention, leaf, None)
    return heads if norm is None else norm(heads)


def _rotation(attention: nn.Module) -> Callable[..., Any]:
    """The function by which the module that defines this attention turns queries and keys."""
    function = getattr(inspect.getmodule(type(attention)), "apply_rotary_pos_emb", None)
    if function is None:
        raise Unsupported(
            "it is not known how this attention turns its queries by their positions",
            found=type(attention).__name__,
        )
    return function  # type: ignore[no-any-return]


def select_attention(
    model: nn.Module, targets: str | tuple[str, ...], traits: Traits, exclude: tuple[str, ...] = ()
) -> list[Site]:
    """The attention modules that ``targets`` names, in the model's order.

    Raises:
        SiteNotFound: a name matches nothing.
        Unsupported: a module is no attention of queries, keys and values by linear layers of its own.
    """
    return [_site(model, site.path) for site in select_blocks(model, targets, traits, exclude)]


def _site(model: nn.Module, path: str) -> Site:
    """The site of an attention module, as wide as what its projections read."""
    attention = innermost(module_at(model, path))
    projections = _projections(attention)
    width, queries, keys = (projections and projections.widths(attention)) or (0, 0, 0)
    norms = [
        getattr(attention, leaf).weight.shape
        for leaf in ("q_norm", "k_norm")
        if hasattr(getattr(attention, leaf, None), "weight")
    ]
    head_dim = getattr(attention, "head_dim", None)
    whole = isinstance(head_dim, int) and keys and keys % head_dim == 0 and queries % keys == 0
    if not whole or any(tuple(shape) != (head_dim,) for shape in norms):
        raise Unsupported(
            "a prompt cannot be added to this kind of attention",
            where=path,
            found=type(attention).__name__,
            expected="head_dim, and linear layers "
            + " or ".join(", ".join(one.parts) for one in _PROJECTIONS),
            remedy="use prefix_tuning",
        )
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
        raise Unsupported(
            "the model has fewer layers than are to be adapted",
            where="adapter_layers",
            expected=f"at most {len(paths)}",
            found=count,
        )
    return dataclasses.replace(config, targets=paths[-count:], adapter_layers=count)
